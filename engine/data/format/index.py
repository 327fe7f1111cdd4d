"""What `index.json` says: the fields of a record, the shards and what they were built from."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from engine.errors import UserError
from engine.files import write_json

FORMAT_VERSION = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Field:
    """One tensor of a family's record: what a row holds, and whether rows belong to images or to captions."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per: Literal["image", "caption"]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."), "per": self.per}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Field":
        return cls(tuple(value["shape"]), getattr(torch, value["dtype"]), value["per"])


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about one shard."""

    file: str
    records: int
    image_rows: int
    caption_rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of `index.json`.

    config: how the shards were asked for; only `identity` is in the fingerprint.
    encode_seconds: what the last build spent encoding, on the slowest process.
    """

    family: str
    fingerprint: str
    identity: dict[str, Any]
    config: dict[str, Any]
    fields: dict[str, Field]
    shards: list[ShardEntry]
    refused: list[dict[str, str]]
    encode_seconds: float = 0.0

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    def write(self, directory: Path) -> None:
        value = {
            "format_version": FORMAT_VERSION,
            "family": self.family,
            "fingerprint": self.fingerprint,
            "records": self.records,
            "image_rows": sum(shard.image_rows for shard in self.shards),
            "caption_rows": sum(shard.caption_rows for shard in self.shards),
            "encode_seconds": self.encode_seconds,
            "refused_count": len(self.refused),
            "identity": self.identity,
            "config": self.config,
            "fields": {name: field.to_json() for name, field in self.fields.items()},
            "shards": [asdict(shard) for shard in self.shards],
            "refused": self.refused,
        }
        write_json(directory / INDEX, value)

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """Raises `UserError` where there is no index, or one that this version cannot read."""
        path = directory / INDEX
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            version = value["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(f"{path}: format version {version}, this engine reads {FORMAT_VERSION}; build the shards again")
            if not isinstance(value["config"], dict):
                raise ValueError("config is not an object")
            return cls(
                value["family"],
                value["fingerprint"],
                value["identity"],
                value["config"],
                {name: Field.from_json(field) for name, field in value["fields"].items()},
                [ShardEntry(**shard) for shard in value["shards"]],
                value["refused"],
                value["encode_seconds"],
            )
        except FileNotFoundError:
            raise UserError(f"{directory}: no {INDEX} there; build shards with `python -m engine.shards build`") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a readable index ({error}); build the shards again") from None
