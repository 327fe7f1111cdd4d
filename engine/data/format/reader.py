"""Read access to all shards of a directory: neither the time to open it nor the memory grows with its records.

A shard is opened and judged when a row of it is first asked for; of their files a bounded number is open at a time. Where a
record's rows are not arithmetic, the numbers that lead to them are read where they lie, as rows are.
"""

import concurrent.futures
import os
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.data.format.gather import best_advise, best_gather, checksums_of
from engine.data.format.index import BUILD_AGAIN, CHECKSUMS, INDEX, OWN, VARYING, Index, shard_name, shards_in
from engine.data.format.shard import open_shard
from engine.errors import UserError
from engine.files import allow_open_files, open_regular

AHEAD = 64  # samples that the kernel fetches from a disk while others are gathered
# Files open at a time, at the most. Linux keeps 0.23 KB for each in a process (counted with 9,766 that were opened): 4 MB.
OPEN_SHARDS = 16384
OTHERS = 1280  # that may be opened yet, a quarter at most of what is allowed: connections, and the files of a checkpoint
Rows = dict[str, Tensor]  # of records [B]: their shards, and rows within these, as `Shards.rows_of` says
Rest = TypeVar("Rest")
_REBUILT = (
    "the shards were built again from a data set that changed, more than once since this run opened them; go on with "
    "--resume_from_checkpoint latest --continue_on_grown_data"
)
_READ_SINGLY = ("image_offsets", "caption_offsets", "caption_numbers")


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

    horizon: how many samples ahead of their reading to `expect` records; 0 where nothing comes of it.
    openers: threads that open files side by side, for a disk or a network that takes its time.

    Args:
        check_rows: whether every row that is read is compared with its checksum.
        readers: how many of this process there are, among which open files and threads are divided.

    Raises:
        UserError: there is no index, it is not true of itself, it has no records, or a shard's file is not there.
    """

    horizon = 0
    openers = 8

    def __init__(self, directory: Path, check_rows: bool = True, readers: int = 1) -> None:
        self.directory, self.check_rows, self.readers = directory, check_rows, readers
        self.index = index = self._read_index()
        self.fields = index.fields
        self.row_bytes = sum(field.row_bytes for field in index.fields.values())
        self._lead = 0  # bytes of rows to ask for ahead: the first is wanted at once
        self._advise_rows, self._gather_rows = best_advise(), best_gather()
        self._first_records = np.cumsum(np.append(0, index.shards["records"]))
        # Of every shard: its descriptor, or -1; when it was last read; which file it was when it was opened, and where in it
        # tensors begin, 0 before.
        count = len(index.shards)
        self._files = np.full(count, -1, np.int32)
        self._read_at, self._identities = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._reads = 0
        singly = (*index.fields, *_READ_SINGLY)
        self._starts = {
            name: np.zeros(count, np.int64) for name in (*singly, *(f"{CHECKSUMS}{name}" for name in singly), "source")
        }
        self._most_open = _allowed_open(count, readers)
        self.openers = max(self.openers // readers, 1)
        self._openers = concurrent.futures.ThreadPoolExecutor(self.openers, "open shards")
        weakref.finalize(self, _close, self._files)

    def _read_index(self) -> Index:
        """The index, whose files are there."""
        index = Index.read(self.directory)
        if index.records == 0:
            raise UserError(f"{self.directory}: the shards hold no records; all {index.refused_count} samples were refused")
        if missing := np.setdiff1d(index.shards["number"], np.fromiter(shards_in(self.directory), np.int64)).tolist():
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.directory / shard_name(missing[0])}{more}: missing, and named in {INDEX}; {BUILD_AGAIN}")
        return index

    def __len__(self) -> int:
        return int(self._first_records[-1])

    @property
    def place(self) -> str:
        """The directory or address, as messages have it."""
        return str(self.directory)

    @property
    def found_together(self) -> int:
        """How many records to look for at a time, so that a shard opened for one is still open when its rows are read."""
        arithmetic = (self.index.shards["variants"] >= 0) & np.isin(self.index.shards["captions"], (OWN, 0))
        return 2**62 if arithmetic.all() or len(arithmetic) <= self._most_open else self._most_open // 2

    def ask(self, batches: list[Rows]) -> tuple[int, int]:
        """Has the rows of micro-batches fetched, which will be gathered: how many bytes, and how many should be on the way."""
        for rows in batches:
            self.advise(rows)
        lead, self._lead = self._lead, AHEAD * self.row_bytes
        return sum(len(rows["record"]) for rows in batches) * self.row_bytes, lead

    def expect(self, records: Tensor) -> None:
        """Says which records [...] will be read within the next `horizon` samples, in the order of their reading."""

    def close(self) -> None:
        """Ends what is being fetched: whoever waits for it is told so."""

    def find(self, records: Tensor) -> Places:
        """Where records [B] lie, and of how many variants and captions each may be drawn."""
        numbers = records.numpy()
        shards = np.searchsorted(self._first_records, numbers, side="right") - 1
        within = numbers - self._first_records[shards]
        images = self._ranges("image_offsets", "variants", shards, within)
        captions = self._ranges("caption_offsets", "captions", shards, within)
        return Places(records, shards, *images, *captions)

    def rows_of(self, places: Places, variants: Tensor | int = 0, captions: Tensor | int = 0) -> Rows:
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
                numbers = self._checked("caption_numbers", shards[numbered], rows["caption"][numbered], 1)
                rows["caption"][numbered] = numbers[:, 0]
        for per, numbers in rows.items():
            if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= self.index.shards[f"{per}_rows"][shards]))):
                raise self._error(shards[wrong[0]], "altered since it was opened")  # rows are not compared with checksums
        return {per: torch.from_numpy(numbers) for per, numbers in rows.items()} | {
            "shard": torch.from_numpy(shards),
            "record": places.records,
        }

    def advise(self, rows: Rows) -> None:
        """Tells the kernel of all fields' rows [B], as `rows_of` has them, that will be gathered."""
        shards = rows["shard"].numpy()
        for part, files in self._open(shards):
            for name, field in self.fields.items():
                starts = self._starts[name][shards[part]]
                self._advise_rows(files, starts + rows[field.per].numpy()[part] * field.row_bytes, field.row_bytes)

    def gather(self, name: str, rows: Rows, out: Tensor, limit: int | None = None) -> None:
        """Copies a field's rows [B], as `rows_of` has them, into `out` [B, *shape], a contiguous host tensor of its dtype.

        Args:
            limit: what whole numbers must be below.

        Raises:
            UserError: a shard that was there can no longer be read, or a row is not what was written or allowed, by name.
        """
        field = self.fields[name]
        shards, numbers = rows["shard"].numpy(), rows[field.per].numpy()
        sums = torch.empty(len(shards), dtype=torch.int64) if self.check_rows else None
        self._read(name, shards, numbers * field.row_bytes, field.row_bytes, out, sums)
        if sums is not None:
            expected = self._numbers(f"{CHECKSUMS}{name}", shards, numbers, 1)[:, 0]
            if len(wrong := np.flatnonzero(sums.numpy() != expected)):
                place = wrong[0]
                raise self._altered(name, int(rows["record"][place]), shards[place], numbers[place])
        if limit is not None:
            found = out.numpy()
            for place in np.argwhere((found < 0) | (found >= limit))[:1]:
                row = f"row {numbers[place[0]]} of {name}"
                raise self._error(shards[place[0]], f"{row} holds {found[*place]}, where numbers are below {limit}")

    def gather_fields(self, rows: Rows, out: Mapping[str, Tensor], limits: Mapping[str, int]) -> None:
        """The same of several fields, all of a shard while it is open."""
        shards = rows["shard"].numpy()
        if len(shards) <= self._most_open:
            for name, target in out.items():
                self.gather(name, rows, target, limits.get(name))
            return
        for part in (torch.from_numpy(part) for part, _ in self._open(shards)):
            some = {of: numbers[part] if numbers.ndim else numbers for of, numbers in rows.items()}
            for name, target in out.items():
                found = target[part]
                self.gather(name, some, found, limits.get(name))
                _bytes_by_row(target)[part] = _bytes_by_row(found)  # torch cannot put numbers of every dtype in places

    def _altered(self, name: str, record: int, shard: int, row: int) -> UserError:
        sample = self._numbers("source", shards := np.array([shard]), record - self._first_records[shards], 1)[0, 0]
        of = f"record {record}, sample {sample} of the data set"
        return self._error(shard, f"altered: row {row} of {name} does not match its checksum ({of})")

    def _error(self, shard: int, problem: str) -> UserError:
        file = self.directory / shard_name(self.index.shards["number"][shard])
        return UserError(f"{file}: {problem}; {_REBUILT if self._rebuilt() else BUILD_AGAIN}", alone=True)

    def _rebuilt(self) -> bool:
        """Whether the index that is there now is another one."""
        try:
            return Index.read(self.directory).fingerprint != self.index.fingerprint
        except (UserError, OSError):
            return False

    def _ranges(self, offsets: str, counts_name: str, shards: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of records begin, counted within their shards as these are, and how many there are."""
        counts = self.index.shards[counts_name][shards]
        counts[counts == OWN] = 1
        starts = records * counts
        if len(varying := np.flatnonzero(counts == VARYING)):
            pairs = self._checked(offsets, shards[varying], records[varying], 2)
            starts[varying], counts[varying] = pairs[:, 0], pairs[:, 1] - pairs[:, 0]
        return starts, counts

    def _checked(self, name: str, shards: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
        """As `_numbers`, which are compared with their checksums."""
        numbers = self._numbers(name, shards, places, count)
        if self.check_rows:
            expected = self._numbers(f"{CHECKSUMS}{name}", shards, places, 1)[:, 0]
            if len(wrong := np.flatnonzero(checksums_of(torch.from_numpy(numbers)).numpy() != expected)):
                place = wrong[0]
                raise self._error(shards[place], f"altered: number {places[place]} of {name} does not match its checksum")
        return numbers

    def _numbers(self, name: str, shards: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
        """Of a tensor of int64, `count` numbers from each of places [B] on: [B, count]."""
        numbers = torch.empty(len(shards), count, dtype=torch.int64)
        self._read(name, shards, places * 8, 8 * count, numbers)
        return numbers.numpy()

    def _read(
        self, name: str, shards: np.ndarray, offsets: np.ndarray, size: int, out: Tensor, sums: Tensor | None = None
    ) -> None:
        """Copies `size` bytes from each of offsets [B] within a tensor into the rows of `out`, their checksums into `sums`."""
        for part, files in self._open(shards):
            whole = len(files) == len(shards)
            target = out if whole else torch.empty_like(out[: len(files)])
            found = sums if whole or sums is None else torch.empty_like(sums[: len(files)])
            try:
                self._gather_rows(files, self._starts[name][shards[part]] + offsets[part], size, target, found)
            except OSError as error:
                shard = shards[part][error.filename]
                raise self._error(shard, f"cannot be read any more: {error.strerror}") from None
            if not whole:
                out[torch.from_numpy(part)] = target
                if sums is not None and found is not None:
                    sums[torch.from_numpy(part)] = found

    def _open(self, shards: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Opens shards [B], as many at a time as may be open.

        Yields: which of them, [n], and their descriptors, int32 [n], to be used before the next are asked for.
        """
        if len(shards) <= self._most_open:
            self._open_together(shards)
            yield np.arange(len(shards)), self._files[shards]
            return
        distinct, which = np.unique(shards, return_inverse=True)
        for first in range(0, len(distinct), self._most_open):
            part = np.flatnonzero((which >= first) & (which < first + self._most_open))
            self._open_together(distinct[first : first + self._most_open])
            yield part, self._files[shards[part]]

    def _open_together(self, shards: np.ndarray) -> None:
        """Opens those shards that are not open; others are closed for them, more than need be, so that this is seldom."""
        self._reads += 1
        self._read_at[shards] = self._reads
        missing = np.unique(shards[self._files[shards] < 0])
        if not len(missing):
            return
        opened = np.flatnonzero(self._files >= 0)
        if (excess := len(opened) + len(missing) - self._most_open) > 0:
            others = opened[self._read_at[opened] < self._reads]
            oldest = others[np.argsort(self._read_at[others])]
            self._close(oldest[: max(excess, len(others) // 2)])
        self._open_side_by_side(missing)

    def _open_side_by_side(self, missing: np.ndarray) -> None:
        for _ in self._openers.map(self._open_all, np.array_split(missing, max(min(self.openers, len(missing)), 1))):
            pass

    def _open_all(self, numbers: np.ndarray) -> None:
        for number in numbers.tolist():
            self._open_one(number)

    def _open_one(self, number: int) -> None:
        """Opens a shard's file; judges what it says when it is the first time, or another file than it was then."""
        path = self.directory / shard_name(self.index.shards["number"][number])
        if self._starts["source"][number]:
            try:
                with open_regular(path) as file:
                    if identity_of(file.fileno()) == self._identities[number]:
                        self._files[number] = os.dup(file.fileno())
                        return
            except OSError as error:
                raise self._error(number, f"cannot be read any more: {error.strerror}") from None
        try:
            shard = open_shard(self.directory, self.index, number)
        except UserError as error:
            if self._rebuilt():
                raise self._error(number, "no longer what it was") from None
            error.alone = True
            raise
        for name, starts in self._starts.items():
            starts[number] = shard.start(name)
        # One look at all checksums, which lie beside each other, instead of one for every row.
        for name in self._starts:
            if name.startswith(CHECKSUMS) and shard.start(name):
                size = shard.file.elements(name) * 8
                self._advise_rows(np.array([shard.file.descriptor], np.int32), np.array([shard.start(name)]), size)
        self._identities[number] = identity_of(shard.file.descriptor)
        self._files[number] = os.dup(shard.file.descriptor)

    def _close(self, shards: np.ndarray) -> None:
        _close(self._files[shards])
        self._files[shards] = -1


def ahead(batches: Iterable[tuple[Shards, Rows, Rest]]) -> Iterator[tuple[Shards, Rows, Rest]]:
    """The same micro-batches, whose rows [B] will be gathered one after another; those of some are fetched meanwhile.

    Those that are asked for together are a quarter of what is on its way: so what lies near each other is read together.
    """
    waiting: deque[tuple[int, list[tuple[Shards, Rows, Rest]]]] = deque()  # micro-batches that were asked for, and their bytes
    group: list[tuple[Shards, Rows, Rest]] = []
    size = lead = on_their_way = 0
    for reader, rows, rest in batches:
        group.append((reader, rows, rest))
        size += len(rows["record"]) * reader.row_bytes
        if size < lead // 4:
            continue
        asked, wanted = _ask(group)
        waiting.append((asked, group))
        on_their_way, lead = on_their_way + asked, max(lead, wanted)
        group, size = [], 0
        while waiting and on_their_way > lead:
            asked, oldest = waiting.popleft()
            on_their_way -= asked
            yield from oldest
    _ask(group)
    for _, each in (*waiting, (0, group)):
        yield from each


def _ask(group: list[tuple[Shards, Rows, Rest]]) -> tuple[int, int]:
    """Has the rows of micro-batches of several readers fetched: `Shards.ask` over all."""
    asked = [reader.ask([rows for of, rows, _ in group if of is reader]) for reader in {each[0]: None for each in group}]
    return sum(size for size, _ in asked), max((wanted for _, wanted in asked), default=0)


def identity_of(descriptor: int) -> int:
    """What tells the file that is open from another that was put in its place, or written to."""
    status = os.fstat(descriptor)
    return hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def _close(files: np.ndarray) -> None:
    for descriptor in files[files >= 0].tolist():
        os.close(descriptor)


def _bytes_by_row(tensor: Tensor) -> Tensor:
    return tensor.view(len(tensor), -1).view(torch.uint8)


def _allowed_open(count: int, readers: int) -> int:
    """How many of so many shards may be open at a time in each of so many readers; raises the limit of open files if it may.

    Where there is room for all of them, how many rows are asked for at a time does not matter.
    """
    wanted, others = min(count, OPEN_SHARDS), len(list(Path("/dev/fd").iterdir()))
    allowed = allow_open_files(wanted * readers + others + OTHERS)
    room = max((allowed - others - min(OTHERS, allowed // 4)) // readers, 2)
    return max(OPEN_SHARDS // readers, 2) if room >= wanted else room
