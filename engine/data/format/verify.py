"""Whether shards on disk are those of the index."""

import concurrent.futures
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.data.format.index import ShardEntry
from engine.files import digest


def check_shard(directory: Path, entry: ShardEntry) -> str | None:
    """What is wrong with a shard on disk, or None."""
    path = directory / entry.file
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{size} bytes instead of {entry.bytes}: {'truncated' if size < entry.bytes else 'altered'}"
        return None if digest(path) == entry.sha256 else "altered: its digest does not match the index"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def verify(
    directory: Path, shards: Sequence[ShardEntry], threads: int = 4, progress: Callable[[], Any] = lambda: None
) -> dict[str, str]:
    """Reads shards whole and compares their digests; returns what is wrong by file name, empty when all is well."""

    def check(entry: ShardEntry) -> tuple[str, str | None]:
        problem = check_shard(directory, entry)
        progress()
        return entry.file, problem

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return {file: problem for file, problem in pool.map(check, shards) if problem}
