"""Shards on remote storage: rows read as ranges of bytes ahead of the step, or whole shards kept on this node.

The index must suffice: a server need not list what it has. What is read is judged as on a disk; what turns out to be wrong is
read once more before it is refused.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.format.buckets import WRITE_AGAIN, Buckets
from engine.data.format.cache import ShardsCache
from engine.data.format.gather import checksums_of
from engine.data.format.index import (
    BUCKETS,
    BUILD_AGAIN,
    CHECKSUMS,
    CONTENT,
    FORMAT_VERSION,
    INDEX,
    NUMBERS,
    VARYING,
    Index,
    read_json,
    shard_name,
)
from engine.data.format.reader import Rows, Shards, identity_of
from engine.data.format.shard import LARGEST_SHARD_HEADER, Shard, open_shard
from engine.errors import UserError
from engine.files import LARGEST_TEXT
from engine.storage import CONNECTIONS, Storage, StorageError
from engine.tensors import bytes_of

WHOLE_COPY = "put a whole copy there"
FETCHERS = 4  # threads that fetch whole shards
MEMORY = 2**28  # bytes of rows that are on their way, or there before they are asked for
HEADS = 2**26  # bytes of what else is kept of shards whose rows are read, or read to judge them
GAP = 2**16  # bytes between two ranges that are read with them: sooner there than another answer
GAP_ROWS, GAP_BYTES = 3, 2**12  # that are read with rows at the most, so that they take no memory to speak of
LONGEST = 2**23  # bytes of a range of rows
_HEADER = 2**14  # bytes that a shard's header is thought to take
_LARGEST_GUESS = 2**20  # bytes that are asked for before the header is judged, and with it


class _Altered(UserError):
    """A shard of which something is not so; it may be once it is fetched again."""

    def __init__(self, shard: int, *lines: str) -> None:
        super().__init__(*lines, alone=True)
        self.shard = shard


def read_index(storage: Storage) -> Index:
    """The index of the shards that lie there, which hold records."""
    with _in_memory(storage) as path_of:
        index = Index.from_json(read_json(path_of(INDEX), FORMAT_VERSION), path_of)
    if index.records == 0:
        raise UserError(f"{storage.named('')}: the shards hold no records")
    return index


def read_buckets(storage: Storage) -> Buckets:
    """Which directories of shards lie there, each of one size of images."""
    with _in_memory(storage) as path_of:
        return Buckets.read(path_of(BUCKETS))


@contextlib.contextmanager
def _in_memory(storage: Storage) -> Iterator[Callable[[str], Path]]:
    """Gives where a copy of a small object lies, by its name."""
    with contextlib.ExitStack() as files:

        def in_memory(name: str) -> Path:
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
            files.callback(os.close, descriptor)
            path = Path(f"/proc/self/fd/{descriptor}")
            files.enter_context(_speaking_of(storage, str(path), name))
            size = storage.size(name)
            if size > LARGEST_TEXT:
                raise StorageError(f"{storage.named(name)}: {size} bytes: larger than any index; {WHOLE_COPY}")
            for piece in storage.pieces(name, 0, size):
                os.write(descriptor, piece)
            return path

        yield functools.cache(in_memory)


@contextlib.contextmanager
def _speaking_of(storage: Storage, local: str, name: str) -> Iterator[None]:
    """Messages about a file here name the object that it is a copy of."""
    try:
        yield
    except UserError as error:
        said = (line.replace(local, storage.named(name)) for line in error.lines)
        error.lines, error.alone = (
            [line.replace(BUILD_AGAIN, WHOLE_COPY).replace(WRITE_AGAIN, WHOLE_COPY) for line in said],
            True,
        )
        raise


class _RemoteShards(Shards):
    """What both ways to read have in common.

    Args:
        index: where it was read already.
    """

    def __init__(self, storage: Storage, check_rows: bool, index: Index | None, readers: int) -> None:
        self.storage, self._index = storage, index
        super().__init__(Path(), check_rows, readers)

    @property
    def place(self) -> str:
        return self.storage.named("")

    def close(self) -> None:
        self.storage.close()
        self._openers.shutdown(wait=False, cancel_futures=True)

    def _read_index(self) -> Index:
        return read_index(self.storage) if self._index is None else self._index

    def _error(self, shard: int, problem: str) -> UserError:
        return _Altered(int(shard), f"{self.storage.named(self._name(shard))}: {problem}; {WHOLE_COPY}")

    def _name(self, shard: int) -> str:
        return shard_name(self.index.shards["number"][shard])

    def advise(self, rows: Rows) -> None:
        """Nothing: what is read was asked for long before."""

    def find(self, records: Tensor) -> Any:
        return self._once_more(super().find, records)

    def rows_of(self, *arguments: Any) -> Rows:
        return self._once_more(super().rows_of, *arguments)

    def gather_fields(self, *arguments: Any) -> None:
        self._once_more(super().gather_fields, *arguments)

    def _once_more(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """What `read` returns; of every shard of which it refuses something, all is fetched once more."""
        again: set[int] = set()
        while True:
            try:
                return read(*arguments)
            except _Altered as error:
                if error.shard in again:
                    raise
                again.add(error.shard)
                self._forget(error.shard)

    def _forget(self, number: int) -> None:
        """Lets a shard, or what was read of it, be fetched again."""
        if self._files[number] >= 0:
            self._close(np.array([number]))

    def _judge(self, number: int, descriptor: int, fetch: Callable[[Shard], None] = lambda shard: None) -> None:
        path = Path(f"/proc/self/fd/{descriptor}")
        try:
            with _speaking_of(self.storage, str(path), self._name(number)):
                shard = open_shard(self.directory, self.index, number, path, fetch)
        except StorageError:
            raise
        except UserError as error:
            raise _Altered(number, *error.lines) from None
        for name, starts in self._starts.items():
            starts[number] = shard.start(name)


class CachedShards(_RemoteShards):
    """Whole shards, kept in a directory of this node.

    Args:
        processes: how many of this node read shards.
    """

    def __init__(
        self,
        storage: Storage,
        cache: ShardsCache,
        processes: int,
        check_rows: bool = True,
        index: Index | None = None,
        readers: int = 1,
    ) -> None:
        super().__init__(storage, check_rows, index, readers)
        self.cache = cache
        largest = int(self.index.shards["bytes"].max())
        share = 2**62 if cache.limit is None else cache.limit // (largest * processes * readers)
        if share < 4:
            of_each = f" and each of {readers} directories" if readers > 1 else ""
            raise UserError(
                f"--shards_cache_limit: too little for the shards at {storage.named('')}, of up to {largest} bytes: give "
                f"{4 * processes * readers * largest} at least, four shards for each process of this node{of_each}"
            )
        # Of what there is room for, half may be open, and so is not removed; a quarter is fetched ahead.
        self._most_open = min(self._most_open, share // 2)
        self._ahead = min(share // 4, 64)
        self.horizon = max(2 * self._ahead * len(self) // len(self.index.shards), 4096)
        self._fetchers = concurrent.futures.ThreadPoolExecutor(max(min(FETCHERS // readers, self._ahead), 1), "fetch shards")
        self._coming: dict[int, concurrent.futures.Future] = {}
        self._wanted: deque[int] = deque()
        self._lock = threading.Lock()

    def close(self) -> None:
        super().close()
        self.cache.close()
        self._fetchers.shutdown(cancel_futures=True)  # what they have begun to write is removed

    def expect(self, records: Tensor) -> None:
        shards = np.searchsorted(self._first_records, records.numpy(), side="right") - 1
        distinct, first = np.unique(shards, return_index=True)
        with self._lock:
            self._wanted = deque(shard for shard in distinct[np.argsort(first)].tolist() if self._files[shard] < 0)
        self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        with self._lock:
            while self._wanted and len(self._coming) < self._ahead:
                shard = self._wanted.popleft()
                if shard not in self._coming:
                    self._coming[shard] = self._fetchers.submit(self.cache.fetch, *self._object(shard), wait=False)

    def _object(self, number: int) -> tuple[str, int, Callable[[], Iterator[bytes]]]:
        entry = self.index.shards[number]
        size = int(entry["bytes"])
        return entry["sha256"].tobytes().hex(), size, lambda: self.storage.pieces(self._name(number), 0, size)

    def _open_one(self, number: int) -> None:
        with self._lock:
            coming = self._coming.pop(number, None)
        self._fetch_ahead()
        try:
            if coming is not None and not coming.cancel():
                coming.result()
            file = self.cache.open(*self._object(number))
        except ValueError as error:
            raise self._error(number, f"altered: {error}") from None
        with file:
            if self._identities[number] != (identity := identity_of(file.fileno())):
                self._judge(number, file.fileno())
                self._identities[number] = identity
            self._files[number] = os.dup(file.fileno())

    def _forget(self, number: int) -> None:
        super()._forget(number)
        self.cache.forget(self._object(number)[0])


class ReadAhead:
    """How many bytes of rows are on their way.

    That is measured: from two micro-batches on twice as many, up to `MEMORY`, while rows are waited for and come faster by it.
    So it ends at what the storage gives, times what it takes to answer.
    """

    def __init__(self) -> None:
        self.size = self._taken = 0  # bytes on their way, and those gathered since `_since`
        self._rate, self._since = 0.0, time.perf_counter()

    def took(self, size: int, waited: bool) -> None:
        """Notes that bytes were gathered, and deepens where they were waited for, if that helped when it was done before."""
        self._taken += size
        if not waited or self._taken <= 4 * self.size:
            return
        now = time.perf_counter()
        rate = self._taken / (now - self._since)
        if rate > 1.1 * self._rate:
            self._rate, self.size = rate, min(2 * self.size, MEMORY)
        self._taken, self._since = 0, now


class RangedShards(_RemoteShards):
    """Nothing on a disk: of a shard what leads to its rows, in memory, and of its rows those that are soon asked for.

    Where that does not fit of the shards that are read at a time, it is judged once, and then asked for row by row.

    Args:
        window: how many shards are read at a time; None for all.
        depth: that all readers of this process have in common.
    """

    openers = CONNECTIONS

    def __init__(
        self,
        storage: Storage,
        check_rows: bool = True,
        window: int | None = None,
        index: Index | None = None,
        readers: int = 1,
        depth: ReadAhead | None = None,
    ) -> None:
        super().__init__(storage, check_rows, index, readers)
        self._ready: dict[str, _Ranges] | None = None  # rows of the micro-batch that is being gathered
        # A header, and numbers of eight bytes: sources, checksums of rows, and what leads to these where it varies.
        table = self.index.shards
        varying = 4 * bool(np.any((table["variants"] == VARYING) | (table["captions"] == VARYING)))
        counted = ("records", *(f"{field.per}_rows" for field in self.fields.values()), *varying * ("records",))
        numbers = 8 * sum(int(table[name].max()) for name in counted)
        head = _HEADER + numbers + CONTENT * int(table["samples"].max())
        room = HEADS // (head * readers)
        self._most_open = min(self._most_open, room)
        self.openers = min(self.openers, max(room, 1))
        count = len(table)
        self._keeps_heads = min(2 * window if window else count, count) <= self._most_open
        self._first_bytes = min(_HEADER + numbers * self._keeps_heads, _LARGEST_GUESS)
        self._pool = concurrent.futures.ThreadPoolExecutor(max(CONNECTIONS // readers, 4), "fetch rows")
        self.depth = depth or ReadAhead()
        self._group_numbers = itertools.count()
        self._groups: dict[int, dict[str, _Ranges]] = {}
        self._left: dict[int, int] = {}  # micro-batches of a group that were not gathered

    def ask(self, batches: list[Rows]) -> tuple[int, int]:
        number, ranges = next(self._group_numbers), self._once_more(self._ask, batches)
        self._groups[number], self._left[number] = ranges, len(batches)
        for rows in batches:
            rows["group"] = torch.tensor(number)
        size = sum(each.rows.numel() for each in ranges.values())
        self.depth.size = max(self.depth.size, 2 * size)
        return size, self.depth.size - 1

    def gather_fields(self, rows: Rows, *arguments: Any) -> None:
        super().gather_fields(rows, *arguments)
        if "group" in rows:
            number = int(rows["group"])
            self._left[number] -= 1
            if not self._left[number]:
                del self._left[number]
                self._groups.pop(number, None)

    @property
    def found_together(self) -> int:
        return super().found_together if self._keeps_heads else 2**62

    def _open(self, shards: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._keeps_heads:
            yield from super()._open(shards)
            return
        self._open_side_by_side(np.unique(shards[self._starts["source"][shards] == 0]))
        yield np.arange(len(shards)), self._files[shards]

    def _ask(self, batches: list[Rows]) -> dict[str, "_Ranges"]:
        """Asks for all rows of micro-batches."""
        shards = np.concatenate([rows["shard"].numpy() for rows in batches])
        found = {}
        for name, field in self.fields.items():
            numbers = np.concatenate([rows[field.per].numpy() for rows in batches])
            found[name] = _Ranges(shards, numbers, field.row_bytes)
            if self.check_rows and not self._keeps_heads:
                found[f"{CHECKSUMS}{name}"] = _Ranges(shards, numbers, 8)
        self._fetch_rows(shards, found)
        return found

    def _fetch_rows(self, shards: np.ndarray, found: dict[str, "_Ranges"]) -> None:
        for part, _ in self._open(shards):
            opened = np.unique(shards[part])
            for name, ranges in found.items():
                ranges.fetch(opened, lambda *run, name=name: self._pool.submit(self._fetch, name, *run))

    def _fetch(self, name: str, shard: int, row: int, target: Tensor) -> None:
        """Reads rows of a field from number `row` on into `target`, uint8 [rows, bytes]."""
        start = int(self._starts[name][shard]) + row * target.shape[1]
        content = target.view(-1).numpy().data
        for piece in self.storage.pieces(self._name(shard), start, start + len(content)):
            content[: len(piece)] = piece
            content = content[len(piece) :]

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def gather(self, name: str, rows: Rows, out: Tensor, *more: Any) -> None:
        self._ready = self._groups.get(int(rows["group"])) if "group" in rows else None
        super().gather(name, rows, out, *more)

    def _read(
        self, name: str, shards: np.ndarray, offsets: np.ndarray, size: int, out: Tensor, sums: Tensor | None = None
    ) -> None:
        if self._keeps_heads and name not in self.fields:
            super()._read(name, shards, offsets, size, out, sums)
            return
        row_bytes = self.fields[name].row_bytes if name in self.fields else 8
        count = size // row_bytes  # of numbers several are read from one on
        numbers = (offsets[:, None] // row_bytes + np.arange(count)).ravel()
        shards = np.repeat(shards, count)
        ranges = self._ready.get(name) if self._ready else None
        if ranges is None:
            ranges = _Ranges(shards, numbers, row_bytes)
            self._fetch_rows(shards, {name: ranges})
        waited = ranges.take(shards, numbers, bytes_of(out).view(-1, row_bytes))
        if sums is not None:
            sums.copy_(checksums_of(out))
        self.depth.took(out.nbytes, waited)

    def _forget(self, number: int) -> None:
        super()._forget(number)
        self._starts["source"][number] = 0
        self._groups.clear()  # what is there of its rows, and, as this is seldom, of all

    def _open_one(self, number: int) -> None:
        """Reads of a shard its header, and, once that is judged, what leads to its rows, into a sparse file at their places."""
        name, size = self._name(number), int(self.index.shards["bytes"][number])
        there = 0  # of what is wanted, all up to here was read

        def fetch(start: int, end: int) -> None:
            nonlocal there
            if (start := max(start, there)) < end:
                for piece in self.storage.pieces(name, start, end):
                    start += os.pwrite(descriptor, piece, start)
                there = end

        def fetch_numbers(shard: Shard) -> None:
            header, first = shard.file.header, shard.file.data_start
            wanted = (of for of in header if of in NUMBERS or (self._keeps_heads and of.startswith(CHECKSUMS)))
            for start, end in _joined(header[of]["data_offsets"] for of in wanted):
                fetch(first + start, first + end)

        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            fetch(0, min(size, self._first_bytes))
            (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
            fetch(0, min(8 + length, size, LARGEST_SHARD_HEADER))
            self._judge(number, descriptor, fetch_numbers)
            if self._keeps_heads:
                self._files[number] = os.dup(descriptor)
        finally:
            os.close(descriptor)


class _Ranges:
    """Rows of one field [N] as ranges of rows that follow each other, some read in between; and the memory for them."""

    def __init__(self, shards: np.ndarray, numbers: np.ndarray, row_bytes: int) -> None:
        keys = np.unique(_keys(shards, numbers))
        longest = max(LONGEST // row_bytes, 1)
        far = np.diff(keys) > 1 + min(GAP // row_bytes, max(GAP_BYTES // row_bytes, GAP_ROWS))
        begins = np.flatnonzero(np.append(True, far))
        ends = keys[np.append(begins[1:] - 1, len(keys) - 1)] + 1
        counts = -(-(ends - keys[begins]) // longest)  # of pieces that each is divided into
        pieces = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self.first = np.repeat(keys[begins], counts) + pieces * longest
        lengths = np.minimum(np.repeat(ends, counts) - self.first, longest)
        self.places = np.cumsum(np.append(0, lengths))
        self.rows = torch.empty(int(self.places[-1]), row_bytes, dtype=torch.uint8)
        self.futures: dict[int, concurrent.futures.Future] = {}

    def fetch(self, shards: np.ndarray, submit: Callable[[int, int, Tensor], concurrent.futures.Future]) -> None:
        """Submits the ranges of some shards."""
        for number in np.flatnonzero(np.isin(self.first >> 40, shards)).tolist():
            first = int(self.first[number])
            target = self.rows[self.places[number] : self.places[number + 1]]
            self.futures[number] = submit(first >> 40, first & (1 << 40) - 1, target)

    def take(self, shards: np.ndarray, numbers: np.ndarray, out: Tensor) -> bool:
        """Copies rows [B] into `out`, uint8 [B, bytes]; whether they had to be waited for."""
        keys = _keys(shards, numbers)
        ranges = np.searchsorted(self.first, keys, side="right") - 1
        futures = [self.futures[number] for number in np.unique(ranges).tolist()]
        waited = not all(future.done() for future in futures)
        for future in futures:
            future.result()
        places = self.places[ranges] + keys - self.first[ranges]
        torch.index_select(self.rows, 0, torch.from_numpy(places), out=out)
        return waited


def _keys(shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """One number for a row of a shard, in the order of both."""
    return shards.astype(np.int64) << 40 | numbers


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges of bytes, those that lie near each other as one."""
    whole: list[int] = []
    for start, end in sorted(ranges):
        if whole and start > whole[1] + GAP:
            yield whole[0], whole[1]
            whole = []
        whole = [whole[0], max(whole[1], end)] if whole else [start, end]
    if whole:
        yield whole[0], whole[1]
