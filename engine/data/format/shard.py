"""Shards on disk: writing one, and read access to all of a directory."""

import itertools
import json
import os
import resource
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engine.data.format.gather import best_gather
from engine.data.format.index import Field, Index
from engine.errors import UserError
from engine.files import write_atomically
from engine.tensors import DTYPES, read_header


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes one shard: complete or absent. `metadata` is stored as JSON in the file's header."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, {"engine": json.dumps(metadata)}))


def read_tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


class Shards:
    """Read access to verified shards: which rows belong to a record, and copying rows into a batch.

    image_counts, caption_counts: int64 [records], the stored variants and the captions of each record.

    Host memory: 32 bytes per record and 8 per caption reference. Every shard file stays open.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = Index.read(directory)
        if self.index.records == 0:
            raise UserError(f"{directory}: the shards hold no records; all {len(self.index.refused)} samples were refused")
        self.fields = self.index.fields
        self._gather = best_gather()
        paths = [directory / entry.file for entry in self.index.shards]
        starts = np.array([_field_starts(path, self.fields) for path in paths], np.int64)
        self._field_starts = dict(zip(self.fields, starts.T, strict=True))
        _allow_open_files(len(paths))
        self._files = np.array([os.open(path, os.O_RDONLY) for path in paths], np.int32)
        weakref.finalize(self, _close_all, self._files.tolist())
        records = [read_tensors(path, ("image_offsets", "caption_offsets", "caption_numbers")) for path in paths]
        self._image_starts, self.image_counts = _join([tensors["image_offsets"] for tensors in records])
        self._caption_starts, self.caption_counts = _join([tensors["caption_offsets"] for tensors in records])
        self._caption_numbers = torch.cat([tensors["caption_numbers"] for tensors in records])
        # First row of each shard, over all shards, and one past the last.
        self._first_rows = {
            "image": np.cumsum([0, *(entry.image_rows for entry in self.index.shards)]),
            "caption": np.cumsum([0, *(entry.caption_rows for entry in self.index.shards)]),
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


def _join(offsets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of offsets [records + 1] within each shard: where each record's range begins over all shards, and its length."""
    bases = itertools.accumulate((int(within[-1]) for within in offsets), initial=0)
    starts = [base + within[:-1] for base, within in zip(bases, offsets, strict=False)]
    return torch.cat(starts), torch.cat([within.diff() for within in offsets])


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files, as far as it may, so that every shard can stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))


def _field_starts(path: Path, fields: dict[str, Field]) -> list[int]:
    """Where each field begins in a shard's file, after a look at its shape and dtype."""
    header, _, data_start = read_header(path)
    for name, field in fields.items():
        if tuple(header[name]["shape"][1:]) != field.shape or DTYPES.get(header[name]["dtype"]) != field.dtype:
            raise UserError(f"{path}: field {name} is not as the index describes it; build the shards again")
    return [data_start + header[name]["data_offsets"][0] for name in fields]
