"""Whether shards on disk are those of the index."""

import concurrent.futures
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.format.index import Index, shard_name
from engine.data.format.shard import open_shard
from engine.files import digest


def check_shard(path: Path, entry: np.void, contents: bool) -> str | None:
    """What is wrong with a shard on disk, or None: it is not there, or has another size or, of its contents, another digest."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{size} bytes instead of {entry['bytes']}: {'truncated' if size < entry['bytes'] else 'altered'}"
        same = not contents or digest(path) == entry["sha256"].tobytes().hex()
        return None if same else "altered: its digest does not match the index"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def verify(
    directory: Path,
    index: Index,
    numbers: Iterable[int],
    contents: bool = True,
    rows: bool = False,
    threads: int = 4,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, str]:
    """What is wrong with shards, by file name; empty when all is well.

    Args:
        numbers: of the shards to look at, by their places in the index.
        contents: read them whole and compare their digests.
        rows: compare every row with its checksum, too.

    Raises:
        UserError: with `rows`, a shard that has its digest is not what it says.
    """

    def check(number: int) -> tuple[str, str | None]:
        name = shard_name(index.shards["number"][number])
        problem = check_shard(directory / name, index.shards[number], contents)
        if rows and not problem:
            problem = open_shard(directory, index, number).damage()
        progress()
        return name, problem

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return {file: problem for file, problem in pool.map(check, numbers) if problem}
