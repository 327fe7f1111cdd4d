"""Read access to all shards of a directory: neither the time to open it nor the memory grows with its records.

A shard is opened and judged when a row of it is first asked for; of their files a bounded number is open at a time. Where a
record's rows are not arithmetic, the numbers that lead to them are read where they lie, as rows are.
"""

import os
import resource
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.data.format.gather import best_gather
from engine.data.format.index import BUILD_AGAIN, CHECKSUMS, INDEX, OWN, SHARD_NAME, VARYING, Index, shard_name
from engine.data.format.shard import checksums_of, open_shard
from engine.errors import UserError
from engine.files import open_regular

OPEN_SHARDS = 1024  # files open at a time, at the most
_NUMBERS = ("source", "image_offsets", "caption_offsets", "caption_numbers")


@dataclass(frozen=True)
class Places:
    """Where records [B] lie: int64 [B] each.

    records: counted over all shards.
    shards: the one that holds each, by its place in the index.
    image_starts, image_counts: the first of a record's image rows within its shard, and how many variants are stored.
    caption_starts, caption_counts: the same of its captions.
    """

    records: Tensor
    shards: np.ndarray
    image_starts: np.ndarray
    image_counts: np.ndarray
    caption_starts: np.ndarray
    caption_counts: np.ndarray


class Shards:
    """Which rows belong to a record, and copying rows into a batch; used by one thread at a time.

    Args:
        check_rows: whether every row that is read is compared with its checksum.

    Raises:
        UserError: there is no index, it is not true of itself, it has no records, or a shard's file is not there.
    """

    def __init__(self, directory: Path, check_rows: bool = True) -> None:
        self.directory, self.check_rows = directory, check_rows
        self.index = index = Index.read(directory)
        if index.records == 0:
            raise UserError(f"{directory}: the shards hold no records; all {index.refused_count} samples were refused")
        if missing := np.setdiff1d(index.shards["number"], np.fromiter(_shards_in(directory), np.int64)).tolist():
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{directory / shard_name(missing[0])}{more}: missing, and named in {INDEX}; {BUILD_AGAIN}")
        self.fields = index.fields
        self._gather_rows = best_gather()
        self._first_records = np.cumsum(np.append(0, index.shards["records"]))
        # Of every shard: its descriptor, or -1; when it was last read; where its tensors begin, 0 before it was opened.
        count = len(index.shards)
        self._files = np.full(count, -1, np.int32)
        self._read_at = np.zeros(count, np.int64)
        self._reads = self._opened = 0
        names = [*index.fields, *(f"{CHECKSUMS}{name}" for name in index.fields), *_NUMBERS]
        self._starts = {name: np.zeros(count, np.int64) for name in names}
        self._most_open = _allow_open_files()
        weakref.finalize(self, _close, self._files)

    def __len__(self) -> int:
        return int(self._first_records[-1])

    def find(self, records: Tensor) -> Places:
        """Where records [B] lie, and of how many variants and captions each may be drawn."""
        numbers = records.numpy()
        shards = np.searchsorted(self._first_records, numbers, side="right") - 1
        within = numbers - self._first_records[shards]
        images = self._ranges("image_offsets", "variants", shards, within)
        captions = self._ranges("caption_offsets", "captions", shards, within)
        return Places(records, shards, *images, *captions)

    def rows_of(self, places: Places, variants: Tensor | int = 0, captions: Tensor | int = 0) -> dict[str, Tensor]:
        """The `image` row and, where there are captions, the `caption` row of each record, within its `shard`: int64 [B] each.

        Args:
            variants: which of its `image_counts` variants, [B] or one for all.
            captions: which of its `caption_counts` captions.
        """
        shards = places.shards
        rows = {"image": places.image_starts + np.asarray(variants)}
        if any(field.per == "caption" for field in self.fields.values()):
            rows["caption"] = places.caption_starts + np.asarray(captions)
            if len(numbered := np.flatnonzero(self.index.shards["captions"][shards] != OWN)):
                numbers = self._numbers("caption_numbers", shards[numbered], rows["caption"][numbered], 1)
                rows["caption"][numbered] = numbers[:, 0]
        for per, numbers in rows.items():
            if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= self.index.shards[f"{per}_rows"][shards]))):
                raise self._error(shards[wrong[0]], "altered since it was opened")
        return {per: torch.from_numpy(numbers) for per, numbers in rows.items()} | {
            "shard": torch.from_numpy(shards),
            "record": places.records,
        }

    def gather(self, name: str, rows: dict[str, Tensor], out: Tensor, limit: int | None = None) -> None:
        """Copies a field's rows [B], as `rows_of` has them, into `out` [B, *shape], a contiguous host tensor of its dtype.

        Args:
            limit: what whole numbers must be below.

        Raises:
            UserError: a shard that was there can no longer be read, or a row is not what was written or allowed, by name.
        """
        field = self.fields[name]
        shards, numbers = rows["shard"].numpy(), rows[field.per].numpy()
        self._read(name, shards, numbers * field.row_bytes, field.row_bytes, out)
        if self.check_rows:
            expected = self._numbers(f"{CHECKSUMS}{name}", shards, numbers, 1)[:, 0]
            if len(wrong := np.flatnonzero(checksums_of(out).numpy() != expected)):
                place = wrong[0]
                raise self._altered(name, int(rows["record"][place]), shards[place], numbers[place])
        if limit is not None:
            found = out.numpy()
            for place in np.argwhere((found < 0) | (found >= limit))[:1]:
                row = f"row {numbers[place[0]]} of {name}"
                raise self._error(shards[place[0]], f"{row} holds {found[*place]}, where numbers are below {limit}")

    def _altered(self, name: str, record: int, shard: int, row: int) -> UserError:
        sample = self._numbers("source", shards := np.array([shard]), record - self._first_records[shards], 1)[0, 0]
        of = f"record {record}, sample {sample} of the data set"
        return self._error(shard, f"altered: row {row} of {name} does not match its checksum ({of})")

    def _error(self, shard: int, problem: str) -> UserError:
        file = self.directory / shard_name(self.index.shards["number"][shard])
        return UserError(f"{file}: {problem}; {BUILD_AGAIN}", alone=True)

    def _ranges(self, offsets: str, counts_name: str, shards: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of records begin, counted within their shards as these are, and how many there are."""
        counts = self.index.shards[counts_name][shards]
        counts[counts == OWN] = 1
        starts = records * counts
        if len(varying := np.flatnonzero(counts == VARYING)):
            pairs = self._numbers(offsets, shards[varying], records[varying], 2)
            starts[varying], counts[varying] = pairs[:, 0], pairs[:, 1] - pairs[:, 0]
        return starts, counts

    def _numbers(self, name: str, shards: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
        """Of a tensor of int64, `count` numbers from each of places [B] on: [B, count]."""
        numbers = torch.empty(len(shards), count, dtype=torch.int64)
        self._read(name, shards, places * 8, 8 * count, numbers)
        return numbers.numpy()

    def _read(self, name: str, shards: np.ndarray, offsets: np.ndarray, size: int, out: Tensor) -> None:
        """Copies `size` bytes from each of offsets [B] within a tensor into the rows of `out`."""
        step = self._most_open // 2
        for first in range(0, len(shards), step):
            part = slice(first, first + step)
            files = self._open(shards[part])
            try:
                self._gather_rows(files, self._starts[name][shards[part]] + offsets[part], size, out[part])
            except OSError as error:
                raise self._error(shards[first + error.filename], f"cannot be read any more: {error.strerror}") from None

    def _open(self, shards: np.ndarray) -> np.ndarray:
        """The descriptors of shards, of which there are half as many as may be open, at the most."""
        self._reads += 1
        self._read_at[shards] = self._reads
        for shard in np.unique(shards[self._files[shards] < 0]).tolist():
            if self._opened == self._most_open:
                self._close_oldest()
            self._files[shard] = self._descriptor(shard)
            self._opened += 1
        return self._files[shards]

    def _descriptor(self, number: int) -> int:
        """Opens a shard's file; judges what it says when it is the first time."""
        if self._starts["source"][number]:
            path = self.directory / shard_name(self.index.shards["number"][number])
            try:
                with open_regular(path) as file:
                    if os.fstat(file.fileno()).st_size != self.index.shards["bytes"][number]:
                        raise self._error(number, "altered since it was opened")
                    return os.dup(file.fileno())
            except OSError as error:
                raise self._error(number, f"cannot be read any more: {error.strerror}") from None
        try:
            shard = open_shard(self.directory, self.index, number)
        except UserError as error:
            raise UserError(*error.lines, alone=True) from None
        for name, starts in self._starts.items():
            starts[number] = shard.start(name)
        return os.dup(shard.file.descriptor)

    def _close_oldest(self) -> None:
        """Closes the half of the files that was not read for the longest time."""
        opened = np.flatnonzero(self._files >= 0)
        oldest = opened[np.argsort(self._read_at[opened])[: len(opened) // 2]]
        for descriptor in self._files[oldest].tolist():
            os.close(descriptor)
        self._files[oldest] = -1
        self._opened -= len(oldest)


def _shards_in(directory: Path) -> Iterator[int]:
    """The numbers in the names of shards in a directory."""
    with os.scandir(directory) as entries:
        for entry in entries:
            number = entry.name.removeprefix(SHARD_NAME).removesuffix(".safetensors")
            if number.isdecimal() and len(number) < 16 and entry.name == shard_name(int(number)):
                yield int(number)


def _close(files: np.ndarray) -> None:
    for descriptor in files[files >= 0].tolist():
        os.close(descriptor)


def _allow_open_files() -> int:
    """Raises this process's limit of open files as far as it may; returns how many shards may be open at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_SHARDS + 256
    if 0 <= soft < wanted:
        soft = min(wanted, hard) if hard >= 0 else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return OPEN_SHARDS if soft < 0 else max(min(OPEN_SHARDS, soft - 256), 2)
