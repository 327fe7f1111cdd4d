"""Files that are complete or absent: written aside, synced, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import resource
import secrets
import shutil
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import OF_ONE_FILE, UserError, blame_the_machine, first_line, system_number
from engine.messages import warn

T = TypeVar("T")
PARTIAL = ".partial"
SEEN_WITHIN = 600.0  # seconds that a network's file system may take to show a node what another one wrote
LOCK = ".lock"  # in a directory that a process holds
# What file systems without locks say, or without any on bytes as far as these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EOVERFLOW)
_FLOCK = struct.Struct("hhqqi0q")  # type, whence, start, length, process: as C has them, 64 bits of an offset
# Bytes of a file that is read as text, whole: Python's objects of a table take several times as many.
LARGEST_TEXT = max(2**30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """The boundary around the reading of a file of others: whatever it makes the code inside raise is one line.

    A lack of memory passes: that is no fault of the file's.

    Raises:
        UserError: with the file, what is wrong with it, and the remedy; or what is wrong with the disk that it lies on.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files that are damaged, or made to be, raise anything
        blame_the_machine(path, error)
        why = first_line(error).removesuffix(f": {path}")
        raise UserError(f"{path}: cannot be read: {why}; {remedy}") from None


def lies_inside(file: Path, folder: Path) -> bool:
    """Whether what a file is a link to lies in the folder, or among the blobs of the hub's cache that the folder is from."""
    try:
        target, base = file.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    blobs = (path.parent.parent / "blobs" for path in (base, *base.parents) if path.parent.name == "snapshots")
    return any(target.is_relative_to(root) for root in (base, *blobs))


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a file for reading, and nothing else: a pipe would wait for ever, a device never end.

    Raises:
        OSError: there is none, or it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    os.set_blocking(descriptor, True)  # a regular file that must first be fetched, from a tape say, is waited for
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, check: Callable[[int], None] = lambda size: None) -> bytes:
    """A regular file, whole; the file system is `asked_again`, so that no sample is lost by one bad moment.

    Args:
        check: is given the size before anything is read, to raise or to wait.

    Raises:
        OSError: there is none, it is no regular file, or it cannot be read.
    """

    def read() -> bytes:
        with open_regular(path) as file:
            check(os.fstat(file.fileno()).st_size)
            return _whole(file)

    return asked_again(read)


def asked_again(read: Callable[[], T]) -> T:
    """What `read` returns; where a network's file system fails, it is asked twice more within a second.

    Raises:
        OSError: it fails again.
    """
    for pause in (0.1, 1.0):
        try:
            return read()
        except OSError as error:
            if error.errno not in (*OF_ONE_FILE, errno.EAGAIN):
                raise
        time.sleep(pause)
    return read()


def seen(path: Path, condition: Callable[[], bool] | None = None, seconds: float | None = None) -> bool:
    """Whether this node comes to see what another one wrote: a network's file system may show it later to one than to others.

    Args:
        condition: on what is there, where it is not enough that something is; an `OSError` or a `UserError` counts as False.
        seconds: to wait; `SEEN_WITHIN` unless given.
    """
    condition, started = condition or partial(os.path.lexists, path), time.monotonic()
    while True:
        with contextlib.suppress(OSError, UserError):
            if condition():
                return True
        waited = time.monotonic() - started
        if waited >= (SEEN_WITHIN if seconds is None else seconds):
            return False
        with contextlib.suppress(OSError):  # has NFS ask whether what it knows of the directory still is so
            os.close(os.open(path.parent, os.O_RDONLY))
        time.sleep(min(1.0, 0.01 + waited / 10))


def unseen(path: Path, who: str | None = None) -> UserError:
    """What to raise where `seen` waited in vain.

    Args:
        who: the processes that do not see it, where all know that and raise it; else this one alone.
    """
    return UserError(
        f"{path}: {who or 'this node'} did not come to see it as the first process does within {SEEN_WITHIN:g} seconds: an "
        "older or another directory is there; mount the same on all nodes, cached for no longer, and start the same again",
        alone=who is None, shared=who is not None, passing=True,
    )  # fmt: skip


def read_text(path: Path) -> str:
    """A regular file of UTF-8.

    Raises:
        OSError, ValueError: it is not there, is not one, or is larger than any that is meant to be read whole.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_TEXT:
            raise ValueError(f"larger than {LARGEST_TEXT >> 20} MiB")
        return _whole(file).decode("utf-8")


def _whole(file: io.BufferedReader) -> bytes:
    """No more than the file system says that there is: of what the system itself makes up, it says nothing."""
    size = os.fstat(file.fileno()).st_size
    content = file.read(size + 1)
    if len(content) > size:
        raise OSError(errno.EINVAL, "not a regular file of a known size", str(file.name))
    return content


def parse_json(text: str | bytes) -> Any:
    """JSON as its standard has it: no NaN, no Infinity nor a number as large, and no key twice.

    Raises:
        ValueError, RecursionError: it is none, or is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) != len(pairs):
            raise ValueError("a key stands there twice")
        return values

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no value of JSON")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)


def sync(path: Path) -> None:
    """Forces a file or a directory entry to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path`, syncs what it wrote and renames it to `path`."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # another process may write the same
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        _permit(temporary, mode)  # a library may have put a file of its own there
        sync(temporary)
        temporary.replace(path)
    except BaseException as error:  # half a file would keep a full disk full
        with contextlib.suppress(OSError):
            temporary.unlink()
        if (number := system_number(error)) is not None:  # under the name that is known
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    sync(path.parent)


def sync_files(directory: Path) -> None:
    """Syncs everything under a directory, and opens to others what a library wrote for its owner alone."""
    probe = directory / PARTIAL
    probe.unlink(missing_ok=True)
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _permit(path, mode)
        sync(path)
    sync(directory)


def _permit(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        with contextlib.suppress(OSError):  # a file system without modes
            path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def lock(directory: Path, shared: bool = False) -> int | None:
    """Holds a directory for this process, or with others that share it; the descriptor for `unlock`, or None where another
    process holds it.

    What is locked is a file in it, opened for writing: of a directory, NFS cannot lock any, nor Lustre one on another node.
    """
    path = directory / LOCK
    for attempt in range(100):
        if attempt:
            time.sleep(min(0.01 * attempt, 0.1))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        free = hold(descriptor, directory, fcntl.F_RDLCK if shared else fcntl.F_WRLCK) is not False
        there = is_at(path, descriptor)
        if there and free:
            _permit(path, stat.S_IFREG | stat.S_IMODE(directory.stat().st_mode) & 0o666)  # to whoever may write there
            return descriptor
        os.close(descriptor)
        if there:
            return None
        # Removed since it was opened, by who held it before.
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return False


def unlock(descriptor: int, directory: Path) -> None:
    """Lets go of what `lock` gave. Who is last removes the file; where nobody can know that, each does."""
    with contextlib.suppress(OSError):
        if hold(descriptor, directory) is not False:
            (directory / LOCK).unlink()
    os.close(descriptor)


@contextlib.contextmanager
def held(directory: Path, shared: bool = False, wait: Callable[[], None] | None = None) -> Iterator[int | None]:
    """Holds a directory as `lock` does; gives the descriptor, or None where another process holds it.

    Args:
        wait: called instead, again and again, until nobody else does.
    """
    while (descriptor := lock(directory, shared)) is None and wait:
        wait()
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            unlock(descriptor, directory)


def hold(descriptor: int, place: Path, kind: int = fcntl.F_WRLCK, byte: int = 0) -> bool | None:
    """Locks a byte of a file, which need not be there, until the descriptor is closed; None where there are no locks, and False
    where another process has it, or another node has removed the file.

    The lock is that of the open file: closing another descriptor of the same file, which ends the locks of `lockf`, leaves it.

    Args:
        place: the directory, for a warning.
        kind: `fcntl.F_WRLCK` against all others, `F_RDLCK` with others, `F_UNLCK` to let go.

    Raises:
        OSError: the disk fails.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:
            return False
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(place)) from None
        warn(
            f"{place}: locks are not supported there ({error.strerror}), so nothing keeps another run from writing there too; "
            "start none beside this one"
        )
        return None
    return True


def is_held(directory: Path) -> bool | None:
    """Whether somebody holds a directory by `lock`, as far as this node knows; None where nothing can be known."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
            return bool(_FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)
        finally:
            os.close(descriptor)
    except OSError:
        return None


def excludes_others(descriptor: int, directory: Path) -> bool:
    """Whether what `lock` gave is held against others; not so on a file system without locks."""
    return hold(descriptor, directory) is True  # once more changes nothing


def share(descriptor: int, directory: Path) -> None:
    """Shares what `excludes_others` asked to be held alone."""
    hold(descriptor, directory, fcntl.F_RDLCK)


def allow_open_files(wanted: int, process: int = 0) -> int:
    """Raises the limit of open files of a process, 0 for this one, as far as it is lower and may be; returns what it is then.

    Raises:
        OSError: the process is another user's, or gone.
    """
    soft, hard = (math.inf if limit < 0 else limit for limit in resource.prlimit(process, resource.RLIMIT_NOFILE))
    if soft < wanted:
        soft = min(wanted, hard)
        resource.prlimit(process, resource.RLIMIT_NOFILE, (int(soft), -1 if hard == math.inf else int(hard)))
    return int(min(soft, sys.maxsize))


def publish_directory(temporary: Path, final: Path) -> None:
    """Syncs every file under `temporary` and renames it to `final`, which must not exist."""
    sync_files(temporary)
    temporary.rename(final)
    sync(final.parent)


def discard(path: Path) -> None:
    """Removes a file or a directory tree, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """The SHA-256 of a JSON-serialisable value, in hexadecimal; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
