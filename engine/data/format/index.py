"""What `index.json` says: the fields of a record, the shards and what they were built from."""

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, MaxLen
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, model_validator

from engine.errors import UserError, blame_the_machine, first_line
from engine.files import digest_of, parse_json, read_text, write_json
from engine.tensors import DTYPES

FORMAT_VERSION = 1
INDEX = "index.json"
BUILD_AGAIN = "build the shards again, or get a whole copy"
# The tensors that tie rows to records, beside the fields.
OF_RECORDS = ("source", "image_offsets", "caption_offsets", "caption_numbers")
_LARGEST_ROW = 2**34  # bytes
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class Stored(BaseModel):
    """An object of JSON of which nothing is converted and nothing unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


def _whole_field(described: "_StoredField") -> "_StoredField":
    if described.to_field().row_bytes > _LARGEST_ROW:
        raise ValueError(f"a row of {described.shape} is larger than any")
    return described


def _known_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"no dtype of shards: {name}")
    return name


def _file_name(name: str) -> str:
    if name in (".", ".."):
        raise ValueError("not the name of a file")
    return name


def _refused(item: dict[str, str]) -> dict[str, str]:
    if not {"source", "reason"} <= item.keys():
        raise ValueError("a refused sample has a source and a reason")
    return item


Count = Annotated[int, Ge(0), Le(2**48)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00-\x1f\x7f]{1,200}$"), AfterValidator(_file_name)]
RefusedSample = Annotated[dict[str, str], AfterValidator(_refused)]


@dataclass(frozen=True)
class Field:
    """One tensor of a family's record: what a row holds, and whether rows belong to images or to captions."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    per: Literal["image", "caption"]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."), "per": self.per}


class _StoredField(Stored):
    shape: Annotated[list[Annotated[int, Ge(1)]], MaxLen(8)]
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    per: Literal["image", "caption"]

    def to_field(self) -> Field:
        return Field(tuple(self.shape), _DTYPES[self.dtype], self.per)


class ShardEntry(Stored):
    """What the index says about one shard."""

    file: FileName
    records: Count
    image_rows: Count
    caption_rows: Count
    bytes: Count
    sha256: Digest


class _StoredIndex(Stored):
    """The object in the file, and what must be so within it."""

    format_version: int
    family: str
    fingerprint: Digest
    records: Count
    image_rows: Count
    caption_rows: Count
    encode_seconds: Annotated[float, Ge(0)]
    refused_count: Count
    identity: dict[str, Any]
    config: dict[str, Any]
    fields: dict[str, Annotated[_StoredField, AfterValidator(_whole_field)]]
    shards: list[ShardEntry]
    refused: list[RefusedSample]

    @model_validator(mode="after")
    def _agrees(self) -> "_StoredIndex":
        for name in ("records", "image_rows", "caption_rows"):
            if (total := sum(getattr(shard, name) for shard in self.shards)) != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, those of the shards are {total}")
        if self.refused_count != len(self.refused):
            raise ValueError(f"refused_count is {self.refused_count}, listed are {len(self.refused)}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")
        if any(name in self.fields for name in OF_RECORDS):
            raise ValueError(f"a field has the name of another tensor ({', '.join(OF_RECORDS)})")
        if self.shards and "image" not in {field.per for field in self.fields.values()}:
            raise ValueError("no field belongs to images")
        if not all(isinstance(self.identity.get(name, {}), dict) for name in ("source", "models", "preprocessing")):
            raise ValueError("identity: source, models and preprocessing are objects")
        if digest_of(self.identity) != self.fingerprint:
            raise ValueError("the fingerprint is not that of the identity")
        return self


def variants_of(identity: dict[str, Any]) -> set[int]:
    """How many rows an image may have, as far as an identity says: crops, of which there may be one alone, and flips."""
    match identity.get("preprocessing"):
        case {"random_flip": bool(flips), "random_crops": int() | None as crops}:
            return {1 + flips, (crops or 1) * (1 + flips)}
    return set()


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

    @functools.cached_property
    def caption_ends(self) -> list[int]:
        """How many captions lie in the shards up to each, that one included."""
        return list(itertools.accumulate(shard.caption_rows for shard in self.shards))

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
            "shards": [shard.model_dump() for shard in self.shards],
            "refused": self.refused,
        }
        write_json(directory / INDEX, value)

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """What it says of itself agrees; whether it is true of the shards is seen when they are opened.

        Raises:
            UserError: there is no index, or one that this version cannot read.
        """
        path = directory / INDEX
        try:
            value = parse_json(read_text(path))
            version = value.get("format_version") if isinstance(value, dict) else None
            if type(version) is int and version != FORMAT_VERSION:
                raise UserError(f"{path}: format version {version}, this engine reads {FORMAT_VERSION}; build the shards again")
            stored = _StoredIndex.model_validate(value)
        except FileNotFoundError:
            raise UserError(f"{directory}: no {INDEX} there; build shards with `python -m engine.shards build`") from None
        except UserError:
            raise
        except Exception as error:  # as in `reading`
            blame_the_machine(path, error)
            raise UserError(f"{path}: not a readable index: {first_line(error)}; {BUILD_AGAIN}") from None
        return cls(
            stored.family,
            stored.fingerprint,
            stored.identity,
            stored.config,
            {name: field.to_field() for name, field in stored.fields.items()},
            stored.shards,
            stored.refused,
            stored.encode_seconds,
        )
