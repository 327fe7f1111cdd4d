"""Files that are complete or absent: written aside, synced, renamed."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


def sync(path: Path) -> None:
    """Forces a file or a directory entry to stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path beside `path`, syncs what it wrote and renames it to `path`."""
    temporary = path.with_name(path.name + PARTIAL)
    mode = _usual_mode(temporary)
    write(temporary)
    _permit(temporary, mode)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync_files(directory: Path) -> None:
    """Syncs everything under a directory, and opens to others what a library wrote for its owner alone."""
    mode = _usual_mode(directory / PARTIAL)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _permit(path, mode)
        sync(path)
    sync(directory)


def _usual_mode(path: Path) -> int:
    """The mode that the umask gives a new file at `path`, where there is none afterwards."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _permit(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        with contextlib.suppress(OSError):  # a file system without modes
            path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def lock(directory: Path) -> int | None:
    """Holds a directory for this process; the descriptor to keep, or None where another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    return descriptor


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
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """The SHA-256 of a JSON-serialisable value, in hexadecimal; independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
