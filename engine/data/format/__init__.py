"""The latent shard format: writing, reading and verifying. Described for other readers in docs/shards.md.

A directory holds `index.json` and `shard-00000.safetensors` ... Each shard covers a range of source samples and stores, per
field of the family's record, one contiguous tensor [rows, ...]. Fields of an image have a row per stored variant (crops,
flips); fields of a caption have a row per distinct caption, stored in the shard where it first appears. Four more tensors
tie rows to records:

    source           int64 [records]      which source sample each record came from
    image_offsets    int64 [records + 1]  record r has image rows image_offsets[r] .. image_offsets[r + 1] - 1 of this shard
    caption_offsets  int64 [records + 1]  and captions caption_numbers[caption_offsets[r] : caption_offsets[r + 1]]
    caption_numbers  int64 [...]          a caption's number over all shards; each shard holds a consecutive range of them
"""

import concurrent.futures
import json
import os
import resource
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engine.data.format.gather import best_gather
from engine.data.samples.order import records_of
from engine.errors import UserError
from engine.files import digest, write_atomically, write_json
from engine.kernels import philox
from engine.tensors import DTYPES, read_header

FORMAT_VERSION = 1
INDEX = "index.json"
RECORD_TENSORS = ("source", "image_offsets", "caption_offsets", "caption_numbers")


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


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes one shard: complete or absent. `metadata` is stored as JSON in the file's header."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, {"engine": json.dumps(metadata)}))


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def check_shard(directory: Path, entry: ShardEntry) -> str | None:
    """What is wrong with a shard on disk, or None."""
    path = directory / entry.file
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"{size} bytes instead of {entry.bytes}: {'truncated' if size < entry.bytes else 'altered'}"
    return None if digest(path) == entry.sha256 else "altered: its digest does not match the index"


def verify(
    directory: Path, shards: Sequence[ShardEntry], threads: int = 4, progress: Callable[[], Any] = lambda: None
) -> dict[str, str]:
    """Reads shards whole and compares their digests; returns what is wrong by file name, empty when all is well."""

    def check(entry: ShardEntry) -> tuple[str, str | None]:
        problem = check_shard(directory, entry)
        progress()
        return entry.file, problem

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return {file: problem for file, problem in pool.map(check, shards) if problem}


class Shards:
    """Read access to verified shards: which rows a slot reads, and copying rows into a batch.

    Host memory: 32 bytes per record and 8 per caption reference. Every shard file stays open.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = Index.read(directory)
        if self.index.records == 0:
            raise UserError(f"{directory}: the shards hold no records; all {len(self.index.refused)} samples were refused")
        self.fields = self.index.fields
        self._gather = best_gather()
        _allow_open_files(len(self.index.shards))
        files, starts = [], {name: [] for name in self.fields}  # type: ignore[var-annotated]
        image_starts, image_counts, caption_starts, caption_counts, caption_numbers = [], [], [], [], []
        row_base = reference_base = 0
        for entry in self.index.shards:
            path = directory / entry.file
            header, _, data_start = read_header(path)
            for name, field in self.fields.items():
                starts[name].append(data_start + _field_start(path, name, header[name], field))
            files.append(os.open(path, os.O_RDONLY))
            tensors = {name: tensor.numpy() for name, tensor in read_tensors(path, RECORD_TENSORS).items()}
            image_starts.append(row_base + tensors["image_offsets"][:-1])
            image_counts.append(np.diff(tensors["image_offsets"]))
            caption_starts.append(reference_base + tensors["caption_offsets"][:-1])
            caption_counts.append(np.diff(tensors["caption_offsets"]))
            caption_numbers.append(tensors["caption_numbers"])
            row_base += entry.image_rows
            reference_base += len(tensors["caption_numbers"])
        weakref.finalize(self, _close_all, files)
        self._files = np.array(files, np.int32)
        self._field_starts = {name: np.array(values, np.int64) for name, values in starts.items()}
        self._image_starts, self._image_counts = _join(image_starts), _join(image_counts)
        self._caption_starts, self._caption_counts = _join(caption_starts), _join(caption_counts)
        self._caption_numbers = _join(caption_numbers)
        # First row of each shard, over all shards, and one past the last.
        self._first_rows = {
            "image": np.cumsum([0, *(entry.image_rows for entry in self.index.shards)]),
            "caption": np.cumsum([0, *(entry.caption_rows for entry in self.index.shards)]),
        }

    def __len__(self) -> int:
        return self.index.records

    def rows_of(self, seed: int, slots: Tensor) -> dict[str, Tensor]:
        """The image row and the caption row that each slot [B] reads: int64 [B] each, numbered over all shards."""
        key = torch.tensor([seed])
        records = records_of(seed, slots, len(self))
        variant = philox.choices(key, slots, philox.IMAGE_VARIANT, self._image_counts[records])
        rows = {"image": self._image_starts[records] + variant}
        if len(self._caption_numbers):
            caption = philox.choices(key, slots, philox.CAPTION, self._caption_counts[records])
            rows["caption"] = self._caption_numbers[self._caption_starts[records] + caption]
        return rows

    def first_rows(self, records: Tensor) -> dict[str, Tensor]:
        """The first image row and the first caption row of records, for showing them."""
        rows = {"image": self._image_starts[records]}
        if len(self._caption_numbers):
            rows["caption"] = self._caption_numbers[self._caption_starts[records]]
        return rows

    def gather(self, name: str, rows: Tensor, out: Tensor) -> None:
        """Copies rows [B] of a field into `out` [B, *shape], a contiguous host tensor of the field's dtype.

        Raises:
            UserError: a shard that was whole when the run began can no longer be read, by name.
        """
        field = self.fields[name]
        numbers = rows.numpy()
        first_rows = self._first_rows[field.per]
        shards = np.searchsorted(first_rows, numbers, side="right") - 1
        offsets = self._field_starts[name][shards] + (numbers - first_rows[shards]) * field.row_bytes
        try:
            self._gather(self._files[shards], offsets, field.row_bytes, out)
        except OSError as error:
            file = self.index.shards[shards[error.filename]].file
            raise UserError(f"{self.directory / file}: cannot be read any more: {error.strerror}", alone=True) from None


def _join(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, as far as it may, so that every shard can stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))


def _field_start(path: Path, name: str, header: dict[str, Any], field: Field) -> int:
    """Where a field begins within a shard's data, after a look at its shape and dtype."""
    if tuple(header["shape"][1:]) != field.shape or DTYPES.get(header["dtype"]) != field.dtype:
        raise UserError(f"{path}: field {name} is not as the index describes it; build the shards again")
    return int(header["data_offsets"][0])
