"""Shards on disk: writing one, and read access to all of a directory."""

import itertools
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
from annotated_types import Len
from pydantic import ConfigDict, StringConstraints
from torch import Tensor

from engine.data.format.gather import best_gather
from engine.data.format.index import (
    BUILD_AGAIN,
    INDEX,
    OF_RECORDS,
    Count,
    Digest,
    Field,
    Index,
    RefusedSample,
    ShardEntry,
    Stored,
    variants_of,
)
from engine.errors import UserError
from engine.files import reading, write_atomically
from engine.tensors import DTYPES, TensorFile

SHARD_NAME = "shard-"  # what the names of all begin with


def shard_name(number: int) -> str:
    return f"{SHARD_NAME}{number:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes one shard: complete or absent. `metadata` is stored as JSON in the file's header."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, {"engine": json.dumps(metadata)}))


class Metadata(Stored):
    """What a shard's header says beside its tensors.

    captions: the texts of its caption rows.
    refused: the samples that it holds no records of.
    unusable_captions: number -> why that caption's row means nothing.
    """

    model_config = ConfigDict(extra="ignore")

    records: Count
    image_rows: Count
    caption_rows: Count
    captions: list[str]
    refused: list[RefusedSample]
    fingerprint: Digest
    unusable_captions: dict[Annotated[str, StringConstraints(pattern="^[0-9]{1,15}$")], Annotated[list[str], Len(2, 2)]] = {}  # noqa: RUF012


class Shard:
    """A shard's file, opened, whose records point to rows that exist.

    said: what its header says of it.
    source, image_offsets, caption_offsets, caption_numbers: int64, as docs/shards.md describes them.

    Args:
        captions: how many there are in the shards up to this one.
        samples: how many the source has.

    Raises:
        UserError: what it says is not so.
    """

    def __init__(self, path: Path, fields: dict[str, Field], captions: int, samples: int) -> None:
        self.path = path
        with reading(path, BUILD_AGAIN):
            self.file = TensorFile(path)
            self.said = Metadata.model_validate(self.file.metadata)
            _check_tensors(self.file.header, self.said, fields)
            self.source, self.image_offsets, self.caption_offsets, self.caption_numbers = map(self.file.tensor, OF_RECORDS)
            _check_offsets("image_offsets", self.image_offsets, self.said.image_rows, self.said.records)
            least = self.said.records if any(field.per == "caption" for field in fields.values()) else 0
            _check_offsets("caption_offsets", self.caption_offsets, len(self.caption_numbers), least)
            _check_numbers("caption_numbers", self.caption_numbers, captions)
            _check_numbers("source", self.source, samples)
            if not _increase(self.source):
                raise ValueError("source does not increase")

    def starts(self, fields: dict[str, Field]) -> list[int]:
        """Where each field begins in the file."""
        return [self.file.data_start + self.file.header[name]["data_offsets"][0] for name in fields]

    def require_variants(self, numbers: set[int]) -> None:
        """Raises `UserError` where an image has not one of these numbers of rows; of none nothing is known."""
        counts = self.image_offsets.diff()
        if numbers and not sum(counts == rows for rows in numbers).all():  # type: ignore[union-attr]
            said = " or ".join(map(str, sorted(numbers)))
            raise UserError(f"{self.path}: an image has not {said} rows, as {INDEX} says; {BUILD_AGAIN}")

    def agree(self, entry: ShardEntry, fingerprint: str) -> None:
        """Raises `UserError` where the index says something else of this shard."""
        said, indexed = (vars(self.said), vars(entry) | {"fingerprint": fingerprint})
        for name in ("records", "image_rows", "caption_rows", "fingerprint"):
            if said[name] != indexed[name]:
                raise UserError(f"{self.path}: {name} is {said[name]}, and {indexed[name]} in {INDEX}; {BUILD_AGAIN}")


def _check_tensors(header: dict[str, Any], said: Metadata, fields: dict[str, Field]) -> None:
    """Whether a header, which is true of its file, describes the tensors that a shard of these fields has."""
    if len(said.captions) != said.caption_rows:
        raise ValueError(f"{len(said.captions)} captions for {said.caption_rows} rows")
    rows = {"image": said.image_rows, "caption": said.caption_rows}
    shapes = {name: [rows[field.per], *field.shape] for name, field in fields.items()}
    dtypes = {name: field.dtype for name, field in fields.items()} | dict.fromkeys(OF_RECORDS, torch.int64)
    shapes |= {"source": [said.records], "image_offsets": [said.records + 1], "caption_offsets": [said.records + 1]}
    if different := sorted(header.keys() ^ dtypes.keys()):
        raise ValueError(f"{different[0]} is {'no tensor of these shards' if different[0] in header else 'missing'}")
    for name, described in header.items():
        shape = shapes.get(name, described["shape"][:1])  # a caption number or more for each record
        if described["shape"] != shape or DTYPES[described["dtype"]] != dtypes[name]:
            raise ValueError(f"{name} is {described['dtype']} {described['shape']}, not {dtypes[name]} {shape}")


def _check_offsets(name: str, offsets: Tensor, end: int, least: int) -> None:
    """Whether offsets lead from 0 to `end`, over something for each record where there are as many as `least`."""
    if offsets[0] != 0 or offsets[-1] != end or not _increase(offsets, strictly=least > 0):
        raise ValueError(f"{name} does not lead from 0 to {end}, each beyond the one before it")


def _check_numbers(name: str, numbers: Tensor, end: int) -> None:
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= end):
        raise ValueError(f"{name} points beyond the {end} that there are")


def _increase(numbers: Tensor, strictly: bool = True) -> bool:
    following, before = numbers[1:], numbers[:-1]  # not their difference, which may overflow
    return bool((following > before if strictly else following >= before).all())


def open_shard(directory: Path, index: Index, number: int) -> Shard:
    """One shard of a directory, as its index describes it.

    Raises:
        UserError: it is not.
    """
    entry = index.shards[number]
    # A caption lies where it first appears.
    shard = Shard(directory / entry.file, index.fields, index.caption_ends[number], index.records + len(index.refused))
    shard.agree(entry, index.fingerprint)
    shard.require_variants(variants_of(index.identity))
    return shard


class Shards:
    """Read access to verified shards: which rows belong to a record, and copying rows into a batch.

    image_counts, caption_counts: int64 [records], the stored variants and the captions of each record.

    Host memory: 32 bytes per record and 8 per caption reference. Every shard file stays open.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = index = Index.read(directory)
        if index.records == 0:
            raise UserError(f"{directory}: the shards hold no records; all {len(index.refused)} samples were refused")
        self.fields = index.fields
        self._gather = best_gather()
        _allow_open_files(len(index.shards))
        starts, records, last = [], [], -1
        self._open: list[TensorFile] = []
        for number in range(len(index.shards)):
            shard = open_shard(directory, index, number)
            if len(shard.source) and shard.source[0] <= last:
                raise UserError(f"{shard.path}: source does not go on from the shard before it; {BUILD_AGAIN}")
            last = int(shard.source[-1]) if len(shard.source) else last
            starts.append(shard.starts(self.fields))
            records.append((shard.image_offsets, shard.caption_offsets, shard.caption_numbers))
            self._open.append(shard.file)
        self._files = np.array([file.descriptor for file in self._open], np.int32)
        self._field_starts = dict(zip(self.fields, np.array(starts, np.int64).T, strict=True))
        image_offsets, caption_offsets, caption_numbers = zip(*records, strict=True)
        self._image_starts, self.image_counts = _join(image_offsets)
        self._caption_starts, self.caption_counts = _join(caption_offsets)
        self._caption_numbers = torch.cat(caption_numbers)
        # First row of each shard, over all shards, and one past the last.
        self._first_rows = {
            "image": np.cumsum([0, *(entry.image_rows for entry in index.shards)]),
            "caption": np.cumsum([0, *(entry.caption_rows for entry in index.shards)]),
        }

    def __len__(self) -> int:
        return self.index.records

    def rows_of(self, records: Tensor, variants: Tensor | int = 0, captions: Tensor | int = 0) -> dict[str, Tensor]:
        """The image row and, where there are captions, the caption row of records [B]: int64 [B] each, over all shards.

        Args:
            variants: which of `image_counts` variants of each record, [B] or one for all.
            captions: which of its `caption_counts` captions.
        """
        rows = {"image": self._image_starts[records] + variants}
        if len(self._caption_numbers):
            rows["caption"] = self._caption_numbers[self._caption_starts[records] + captions]
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


def _join(offsets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of offsets [records + 1] within each shard: where each record's range begins over all shards, and its length."""
    bases = itertools.accumulate((int(within[-1]) for within in offsets), initial=0)
    starts = [base + within[:-1] for base, within in zip(bases, offsets, strict=False)]
    return torch.cat(starts), torch.cat([within.diff() for within in offsets])


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, as far as it may, so that every shard can stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))
