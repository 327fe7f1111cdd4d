"""Whole shards of remote storage, kept on this node's disk under the digests of their bytes, for all its processes.

A file is complete or absent, and one that is read is locked: what is removed to make room is what nobody reads, the longest
unused first. One process fetches a shard, the others wait for it. Killed at any time, a process leaves at most a file that the
next one removes.
"""

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import PARTIAL, open_regular, write_atomically

_SUFFIX = ".safetensors"
_LOCK = ".lock"

Read = Callable[[Callable[[bytes], Any]], None]  # hands the bytes of an object to what it is given, piece by piece


class ShardsCache:
    """Used by any number of threads and processes.

    Args:
        limit: bytes that the directory may take, beside what is in use.

    Raises:
        UserError: nothing can be kept there.
    """

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        self.directory, self.limit = directory, limit
        try:
            directory.mkdir(parents=True, exist_ok=True)
            room = directory / f"room{_LOCK}"
            with _held(room, wait=True), open_regular(room) as other:
                excluded = not _lock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}; name another --shards_cache") from None
        if not excluded:
            raise UserError(f"{directory}: the file system there knows no locks; name a --shards_cache on a disk of this node")
        for path in directory.glob(f"*{_LOCK}"):
            with _held(path, wait=False) as held:
                if held:
                    self._sweep(path.name.removesuffix(_LOCK))

    def open(self, digest: str, size: int, read: Read) -> io.BufferedReader:
        """A whole shard, fetched if it is not there; locked until it is closed.

        Args:
            digest: its SHA-256, in hexadecimal.

        Raises:
            ValueError: what was fetched has another digest, twice.
            UserError: it cannot be fetched.
        """
        while True:
            try:
                file = open_regular(self._path(digest))
            except FileNotFoundError:
                self.fetch(digest, size, read)
                continue
            if _lock(file.fileno(), fcntl.LOCK_SH):
                with contextlib.suppress(PermissionError):  # another user's
                    os.utime(file.fileno())
                return file
            file.close()  # removed since it was opened

    def fetch(self, digest: str, size: int, read: Read, wait: bool = True) -> None:
        """Fetches a shard, unless it is there.

        Args:
            wait: for another process that is fetching it; else leave it to that one.

        Raises:
            ValueError, UserError: as `open` says.
        """
        if self._path(digest).exists():
            return
        with _held(self.directory / f"{digest}{_LOCK}", wait) as held:
            if not held or self._path(digest).exists():
                return
            self._sweep(digest)
            try:
                self._write(digest, size, read)
            except _OtherDigest:
                self._write(digest, size, read)

    def forget(self, digest: str) -> None:
        """Removes a shard that is damaged."""
        self._path(digest).unlink(missing_ok=True)

    def _write(self, digest: str, size: int, read: Read) -> None:
        def write(path: Path) -> None:
            total = hashlib.sha256()
            with path.open("r+b") as file:
                with _held(self.directory / f"room{_LOCK}", wait=True):
                    self._make_room(size)
                    file.truncate(size)  # so that others count it

                def take(piece: bytes) -> None:
                    total.update(piece)
                    file.write(piece)

                read(take)
            if total.hexdigest() != digest:
                raise _OtherDigest("its digest does not match the index")

        try:
            write_atomically(self._path(digest), write)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written: {error.strerror}; make room there, or give a lower --shards_cache_limit",
                alone=True,
            ) from None

    def _make_room(self, size: int) -> None:
        """Removes what was not used for the longest time and is not read, until so many bytes more are within the limit."""
        if self.limit is None:
            return
        found = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
        over = sum(bytes for _, bytes, _ in found) + size - self.limit
        for _, bytes, path in sorted(found):
            if over <= 0:
                return
            if path.suffix == _SUFFIX and _remove_unused(path):
                over -= bytes

    def _sweep(self, digest: str) -> None:
        """Removes what a killed process left of a shard; nobody else is fetching it."""
        for path in self.directory.glob(f"{digest}{_SUFFIX}.*{PARTIAL}"):
            path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.directory / f"{digest}{_SUFFIX}"


class _OtherDigest(ValueError):
    """What was fetched is not what the index says."""


def _remove_unused(path: Path) -> bool:
    """Removes a file that no process has open through this module; returns whether it did."""
    try:
        with open_regular(path) as file:
            if not _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            path.unlink()
            return True
    except FileNotFoundError:
        return False


def _lock(descriptor: int, how: int) -> bool:
    """Whether a file is locked now, and still there. A file system without locks lets everybody pass."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return os.fstat(descriptor).st_nlink > 0


@contextlib.contextmanager
def _held(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock file, which is removed in the end; gives whether it is held."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if _lock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return
            if not wait:
                yield False
                return
        finally:
            os.close(descriptor)
