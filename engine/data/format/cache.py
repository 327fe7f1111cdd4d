"""Whole shards of remote storage, kept on this node's disk under the digests of their bytes, for all its processes.

A file is complete or absent, and one that is read or written is locked: what is removed to make room is what nobody reads, the
longest unused first. One process fetches a shard, the others wait for it. Killed at any time, a process leaves at most a file
that the next one removes. Other files that lie there are nobody's business here.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine.errors import UserError
from engine.files import PARTIAL, digest, open_regular, sync

PATIENCE = 60.0  # seconds that a process waits for another one that does not come on
_POLL = 0.02  # seconds between two looks at what others do
_SUFFIX, _ROOM = ".safetensors", "room.lock"
_OURS = re.compile(rf"[0-9a-f]{{64}}\{_SUFFIX}(\.[0-9a-f]{{8}}\{PARTIAL})?")

Read = Callable[[], Iterable[bytes]]  # gives the bytes of an object, piece by piece


class ShardsCache:
    """Used by any number of threads and processes, also of several users.

    Args:
        limit: bytes that its shards may take, beside what is in use.

    Raises:
        UserError: nothing can be kept there.
    """

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        self.directory, self.limit = directory, limit
        self._closed = threading.Event()
        self._trusted: set[int] = set()  # of other users' files, those that were found to be what they are called
        with self._on_the_disk(), self._alone():
            if other := self._lock_room():
                other.close()
                raise UserError(f"{directory}: its file system knows no locks; name a --shards_cache on a disk of this node")
            self._sweep()

    def open(self, digest: str, size: int, read: Read) -> io.BufferedReader:
        """A whole shard, fetched if it is not there; locked until it is closed.

        Args:
            digest: its SHA-256, in hexadecimal.

        Raises:
            ValueError: what was fetched has another digest.
            UserError: it cannot be fetched, or not be kept.
        """
        with self._on_the_disk():
            while True:
                try:
                    file = open_regular(self._path(digest))
                except FileNotFoundError:
                    self.fetch(digest, size, read)
                    continue
                if _locked(file.fileno(), fcntl.LOCK_SH) and self._is_what_it_is_called(file, digest):
                    with contextlib.suppress(PermissionError):  # another user's
                        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
                    return file
                file.close()  # removed since it was opened

    def fetch(self, digest: str, size: int, read: Read, wait: bool = True) -> None:
        """Fetches a shard, unless it is there.

        Args:
            wait: for another process that is fetching it; else leave it to that one.

        Raises:
            ValueError, UserError: as `open` says.
        """
        with self._on_the_disk():
            while not self._path(digest).exists():
                with self._alone():
                    file = None if self._is_coming(digest) else self._begin(digest, size)
                if file is not None:
                    with file:
                        self._write(file, digest, read)
                    return
                if not wait:
                    return
                if self._closed.wait(_POLL):
                    raise UserError(f"{self.directory}: closed", alone=True)

    def forget(self, digest: str) -> None:
        """Removes a shard that is damaged."""
        with self._on_the_disk():
            self._path(digest).unlink(missing_ok=True)

    def close(self) -> None:
        """Nobody waits for other processes any more."""
        self._closed.set()

    def _begin(self, digest: str, size: int) -> io.BufferedWriter:
        """A file for a shard, locked, that takes its whole room from the start."""
        self._sweep()
        self._make_room(size)
        file = self.directory.joinpath(f"{digest}{_SUFFIX}.{secrets.token_hex(4)}{PARTIAL}").open("xb")
        try:
            _locked(file.fileno(), fcntl.LOCK_EX)
            os.posix_fallocate(file.fileno(), 0, size)
        except BaseException:
            Path(file.name).unlink()
            file.close()
            raise
        return file

    def _write(self, file: io.BufferedWriter, digest: str, read: Read) -> None:
        partial, total = Path(file.name), hashlib.sha256()
        try:
            for piece in read():
                total.update(piece)
                file.write(piece)
            if total.hexdigest() != digest:
                raise ValueError("its digest does not match the index")
            file.flush()
            os.fsync(file.fileno())
            partial.replace(self._path(digest))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(self.directory)

    def _is_coming(self, digest: str) -> bool:
        """Whether another process, or thread, fetches a shard and comes on with it."""
        for path in self.directory.glob(f"{digest}{_SUFFIX}.*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
                came_on = time.time() - os.fstat(file.fileno()).st_mtime < PATIENCE
                if came_on and not _locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                    return True
        return False

    def _sweep(self) -> None:
        """Removes what killed processes left."""
        for _, _, path in self._files():
            if path.suffix == PARTIAL:
                _remove_unused(path)

    def _make_room(self, size: int) -> None:
        """Removes what was not used for the longest time and is not read, until so many bytes more are within the limit."""
        if self.limit is None:
            return
        found = self._files()
        over = sum(bytes for _, bytes, _ in found) + size - self.limit
        for _, bytes, path in sorted(found):
            if over <= 0:
                return
            if path.suffix == _SUFFIX and _remove_unused(path):
                over -= bytes

    def _files(self) -> list[tuple[int, int, Path]]:
        """Of every file that is the cache's, when it was used last, its bytes and its path."""
        found = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        found.append((max(status.st_atime_ns, status.st_mtime_ns), status.st_size, Path(entry.path)))
        return found

    def _is_what_it_is_called(self, file: io.BufferedReader, name: str) -> bool:
        """What this user wrote was compared then. What another one wrote is compared once, and removed if it is not so."""
        status = os.fstat(file.fileno())
        if status.st_uid in (os.getuid(), 0) or status.st_ino in self._trusted:
            return True
        if digest(Path(f"/proc/self/fd/{file.fileno()}")) == name:
            self._trusted.add(status.st_ino)
            return True
        self._path(name).unlink(missing_ok=True)
        return False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps the others from beginning or removing files; only for so long, should one hang."""
        give_up = time.monotonic() + PATIENCE
        while (room := self._lock_room()) is None and time.monotonic() < give_up and not self._closed.wait(_POLL):
            pass
        with room or contextlib.nullcontext():
            yield

    def _lock_room(self) -> io.BufferedReader | None:
        """The file that is locked by who begins and removes others, open and locked; None while it is somebody else."""
        path = self.directory / _ROOM
        with contextlib.suppress(FileExistsError), path.open("xb"):
            pass
        file = open_regular(path)  # for reading, as it may be another user's
        if _locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            return file
        file.close()
        return None

    @contextlib.contextmanager
    def _on_the_disk(self) -> Iterator[None]:
        """What goes wrong with the directory is said in one line."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)  # also when somebody removed it meanwhile
            yield
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written: {error.strerror or error}; make room there, give a lower "
                "--shards_cache_limit, or name another --shards_cache",
                alone=True, passing=True,
            ) from None  # fmt: skip

    def _path(self, digest: str) -> Path:
        return self.directory / f"{digest}{_SUFFIX}"


def _remove_unused(path: Path) -> bool:
    """Removes a file that no process has open through this module and that this user may remove; returns whether it did."""
    with contextlib.suppress(FileNotFoundError, PermissionError), open_regular(path) as file:
        if _locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            path.unlink()
            return True
    return False


def _locked(descriptor: int, how: int) -> bool:
    """Whether a file is locked now, and still there."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0
