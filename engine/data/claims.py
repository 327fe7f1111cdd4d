"""Who builds which shard, among processes of one launch or of many: claims that end with the process that holds them.

A file beside the shards, which is there while they are built, has a slot for each: how many of its samples are done and, once
it is complete, what the index will say of it. A byte of the file is locked by whoever works on a shard; the operating system
gives it back when that process ends, however it does. The processes of a launch claim shards through their store too, where one
that gives no sign of life loses its own. Where there are no locks, launches may work on the same: complete shards are the same
whoever wrote them.
"""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from engine.data.format.index import ENTRY
from engine.data.plan import Plan
from engine.files import hold, is_at
from engine.processes import Processes

BUILDING = "building"
# told: what tells the samples of its block from others; check: XXH3 of the bytes before it.
SLOT = np.dtype([("done", np.int64), ("told", np.uint64), ("entry", ENTRY), ("check", np.uint64)])
_PLAN, _INDEX, _SLOTS = 2**61, 2**61 + 1, 2**40  # bytes that are locked and never written, and the first of slots
_TOKEN = 16  # bytes after the last slot, drawn at random
PAUSE = 0.2  # seconds between two looks at what another process holds


class Claims:
    """The file of a directory, opened by this process.

    Args:
        processes: of this launch, which agree beside the file, as locks may hold on one node only, or not at all.
        build: which one of this launch this is.
        create: the file, where there is none.
    """

    def __init__(self, directory: Path, processes: Processes, build: int = 0, create: bool = True) -> None:
        self.path, self.processes, self.build = directory / BUILDING, processes, build
        self.descriptor = os.open(self.path, os.O_RDWR | (os.O_CREAT if create else 0) | os.O_NOFOLLOW, 0o666)

    def leave(self) -> None:
        """Closes the file, and removes it where nothing was begun."""
        if self.is_there() and not os.fstat(self.descriptor).st_size and self.alone():
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def is_there(self) -> bool:
        """Whether the file was not removed since it was opened, by a process whose build was complete."""
        return is_at(self.path, self.descriptor)

    def _lock(self, byte: int, kind: int = fcntl.F_WRLCK) -> bool:
        """Locks a byte for this process; whether no other one holds it."""
        return hold(self.descriptor, self.path.parent, kind, byte) is not False

    def alone(self) -> bool:
        """Whether no other process builds here; none begins until `join`."""
        return self._lock(_PLAN)

    def join(self) -> bool:
        """Builds beside others; False while one of them is planning."""
        return self._lock(_PLAN, fcntl.F_RDLCK)

    @contextlib.contextmanager
    def shard(self, place: int) -> Iterator[bool]:
        """Claims the shard of a block by its place in the plan; gives whether it is this process's now."""
        free, key = self._lock(_SLOTS + place), f"shard/{self.path}/{self.build}/{place}"
        try:
            mine = free and self.processes.is_mine(key)
            yield mine
            if mine:
                self.processes.give_back(key)
        finally:
            if free:
                self._lock(_SLOTS + place, fcntl.F_UNLCK)

    @contextlib.contextmanager
    def index(self) -> Iterator[None]:
        """Waits until no other process writes the index."""
        while self.is_there() and not self._lock(_INDEX):
            time.sleep(PAUSE)
        try:
            yield
        finally:
            self._lock(_INDEX, fcntl.F_UNLCK)

    def begin(self, plan: Plan) -> None:
        """Makes the slots of a plan, with what is known of shards that are complete."""
        before = {int(slot["entry"]["number"]): slot for slot in self._slots() if _is_whole(slot)}
        slots = np.zeros(len(plan.blocks), SLOT)
        for place, number in enumerate(plan.blocks["number"].tolist() if before else ()):
            if number in before:
                slots[place] = before[number]
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, slots.tobytes() + secrets.token_bytes(_TOKEN), 0)
        os.fsync(self.descriptor)

    @property
    def token(self) -> bytes:
        """What tells this build from others on every node, which may number the file differently; nothing before it began."""
        size = os.fstat(self.descriptor).st_size
        return os.pread(self.descriptor, _TOKEN, size // SLOT.itemsize * SLOT.itemsize)

    def _slots(self) -> np.ndarray:
        content = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)
        return np.frombuffer(content[: len(content) // SLOT.itemsize * SLOT.itemsize], SLOT)

    def done(self) -> int:
        """How many samples all processes are done with."""
        return int(self._slots()["done"].sum())

    def advance(self, place: int, done: int) -> None:
        """Says how many samples of a block are done."""
        os.pwrite(self.descriptor, np.int64(done).tobytes(), place * SLOT.itemsize)

    def complete(self, place: int, numbers: np.ndarray, entry: tuple) -> None:
        """Says that the shard of a block of these samples is written."""
        slot = np.zeros(1, SLOT)
        slot["done"], slot["told"], slot["entry"] = len(numbers), _told_of(numbers), np.array([entry], ENTRY)
        slot["check"] = _check_of(slot[0])
        os.pwrite(self.descriptor, slot.tobytes(), place * SLOT.itemsize)

    def entry(self, place: int, block: np.void, numbers: np.ndarray) -> np.void | None:
        """What the index says of the shard of a block; None where that is not known to be complete, with these samples."""
        content = os.pread(self.descriptor, SLOT.itemsize, place * SLOT.itemsize)
        slot = np.frombuffer(content, SLOT)[0] if len(content) == SLOT.itemsize else None
        if slot is None or not _is_whole(slot) or slot["told"] != _told_of(numbers):
            return None
        entry = slot["entry"]
        return entry if all(entry[name] == block[name] for name in ("first_sample", "samples", "number")) else None


def _told_of(numbers: np.ndarray) -> int:
    """What tells the samples of a block from others."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(numbers).data)


def _check_of(slot: np.void) -> int:
    return xxhash.xxh3_64_intdigest(slot.tobytes()[: -SLOT["check"].itemsize])


def _is_whole(slot: np.void) -> bool:
    return bool(slot["check"] == _check_of(slot)) and bool(slot["check"])
