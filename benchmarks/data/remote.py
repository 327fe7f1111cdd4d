"""How fast are shards read from a server, and what do killed readers leave? `python -m benchmarks.data.remote [--json FILE]`

A server on this machine begins each answer after 0, 20 or 100 ms. Rows of eight shards are read as ranges, in the order of all
records and in one by locality (of windows of two shards), or whole shards are kept in a cache, empty at first, that has room
for five. The same samples are read from the disk beside it.

Counted before: a range costs some 0.2 ms of a processor here, and at most 64 are asked for at a time. So a sample of three
fields takes 0.6 ms of a processor, and at 100 ms no more than 640 ranges come in a second: 213 samples, however much is
on its way. A whole shard is one answer for all its rows. `depth_mib` is how much was on its way in the end.

The last row kills, with SIGKILL and at random instants, one of two processes that read through one cache, and looks at what is
there: files whose digests are not their names, and what the next one to begin leaves of files that were half there.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tools.drawing import draw
from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.served import served_late
from benchmarks.tools.shards import FAMILIES, fields_of, write_shards
from benchmarks.tools.tables import problem
from engine.data.format.cache import ShardsCache
from engine.data.format.reader import Shards
from engine.data.format.remote import CachedShards, RangedShards
from engine.files import digest
from engine.storage import Storage

SHARDS, SHARD = 8, {"sd": 256, "prior": 1024}  # and records of each
CACHED, WINDOW = 5, 2  # shards that the cache has room for, and that are read at a time
BATCH, SECONDS, KILLS = 64, 5.0, 40
LATENCIES = [0.0, 0.02, 0.1]


def read(shards: Shards, window: int | None) -> dict[str, Any]:
    """Seconds to the first batch, and samples per second after it: over an epoch, or `SECONDS`."""
    started, busy, done = time.perf_counter(), time.process_time(), 0
    with draw(shards, BATCH, range(len(shards) // BATCH), window) as batches, contextlib.closing(shards):
        next(batches)
        first = time.perf_counter()
        for _ in batches:
            done += 1
            if time.perf_counter() - first > SECONDS:
                break
        end = time.perf_counter()
    return {
        "first_seconds": first - started, "samples_per_second": done * BATCH / (end - first),
        "processor_microseconds": (time.process_time() - busy) / (done + 1) / BATCH * 1e6,
        "depth_mib": shards.depth.size / 2**20 if isinstance(shards, RangedShards) else 0.0,
    }  # fmt: skip


def measure(directory: Path, way: str, latency: float) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if way == "disk":
            return read(Shards(directory), None)
        storage = Storage(stack.enter_context(served_late(directory, latency)))
        if way != "cache":
            return read(RangedShards(storage), WINDOW if "blocks" in way else None)
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return read(CachedShards(storage, ShardsCache(cache, some_shards(directory)), 1), WINDOW)


def some_shards(directory: Path) -> int:
    """Bytes of `CACHED` shards."""
    return CACHED * max(path.stat().st_size for path in directory.glob("shard-*"))


def read_for_ever(address: str, cache: Path, limit: int) -> None:
    while True:
        read(CachedShards(Storage(address), ShardsCache(cache, limit), 1), WINDOW)


def kills(directory: Path) -> dict[str, Any]:
    """What `KILLS` kills leave in a cache that has not room for all shards, so that these come and go."""
    limit, context, moments = some_shards(directory), multiprocessing.get_context("fork"), random.Random(4)
    corrupt, half_written = 0, 0
    with tempfile.TemporaryDirectory() as name, served_late(directory, 0.002) as address:
        cache = Path(name)
        start: Callable[[], Any] = partial(context.Process, target=read_for_ever, args=(address, cache, limit), daemon=True)
        readers = [start(), start()]
        for reader in readers:
            reader.start()
        for number in range(KILLS):
            time.sleep(moments.uniform(0.05, 0.5))
            killed = readers[number % 2]
            assert killed.pid is not None
            os.kill(killed.pid, signal.SIGKILL)
            killed.join()
            half_written += any(cache.glob("*.partial"))
            for path in itertools.islice(cache.glob("*.safetensors"), 2):
                with contextlib.suppress(FileNotFoundError):  # the other one makes room
                    corrupt += digest(path) != path.stem
                    path.unlink()
            readers[number % 2] = start()
            readers[number % 2].start()
        for reader in readers:
            assert reader.is_alive()
            reader.kill()
            reader.join()
        corrupt += sum(digest(path) != path.stem for path in cache.glob("*.safetensors"))
        ShardsCache(cache)
        left = [path.name for path in cache.glob("*.partial")]
    return {"kills": KILLS, "in_the_middle_of_a_file": half_written, "corrupt_files": corrupt, "left": left}


def main() -> int:
    parser = command_line(__doc__)
    options = parser.parse_args()
    kept = Rows(options.json, __doc__, options.minutes)
    with tempfile.TemporaryDirectory() as name:
        for kind, size in SHARD.items():
            (directory := Path(name) / kind).mkdir()
            write_shards(directory, SHARDS * size, FAMILIES[kind], fields_of(kind), size)
            ways = itertools.product(LATENCIES, ("ranges, global", "ranges, blocks", "cache"))
            for latency, way in [(0.0, "disk"), *ways]:
                named = f"{kind}, {way}" + (f", {latency * 1e3:.0f} ms" if way != "disk" else "")
                row = kept.measure(named, 2 * SECONDS, partial(measure, directory, way, latency))
                print(f"{named:32}", problem(row) or "  ".join(f"{of} {value:.4g}" for of, value in row.items() if of in (
                    "first_seconds", "samples_per_second", "processor_microseconds", "depth_mib")))  # fmt: skip
        row = kept.measure("kills", 30, partial(kills, Path(name) / "prior"))
        print("kills", problem(row) or {of: row[of] for of in ("kills", "in_the_middle_of_a_file", "corrupt_files", "left")})
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
