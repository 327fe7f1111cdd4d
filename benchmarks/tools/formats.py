"""The engine's shards, MDS, WebDataset and litdata on the same records, each as its makers advise for random order.

`python formats.py write|measure SIDE KIND DIRECTORY [--workers N]` runs in a process of its own, with a Python that has the
library of its side; of the project, the engine's sides alone import anything. What was measured is printed as JSON.

The peers decode to arrays without a copy and collate with one; MDS and litdata without compression and with the chunks of 64 MB
that are their defaults, WebDataset in tars of the same size, with a buffer of 1,000 samples behind shuffled tars.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tools.kinds import KINDS, SEED

CHUNK = 2**26  # bytes of the peers' files; that is their default
SHARD = 1024  # records of the engine's shards, as by default
BUFFER = 1000  # samples that WebDataset shuffles


def record_of(kind: str, number: int) -> dict[str, np.ndarray]:
    """A record as the bits of its bf16 numbers: uint16 arrays."""
    generator = torch.Generator().manual_seed(number)
    values = {name: torch.randn(shape, generator=generator).bfloat16() for name, (shape, _) in KINDS[kind].items()}
    return {name: value.view(torch.uint16).numpy() for name, value in values.items()}


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    names = [name for name in samples[0] if not name.startswith("__")]  # as WebDataset calls its own
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])).view(torch.bfloat16) for name in names}


class Engine:
    """The engine's loader: one process, rows gathered by C++.

    Args:
        window: shards of the order by locality, None for that of all records. Over HTTP, rows are read as ranges in that of
            all, and whole shards are kept in that by locality.
        checked: whether rows are compared with their checksums.
    """

    def __init__(self, window: int | None = None, checked: bool = True) -> None:
        self.window, self.checked = window, checked

    def load(self) -> None:
        for name in ("benchmarks.tools.drawing", "engine.data.format.remote", "numpy.ma"):
            importlib.import_module(name)

    def write(self, directory: Path, kind: str, records: int) -> None:
        from benchmarks.tools.shards import FAMILIES, fields_of, write_shards

        def rows_of(numbers: range) -> dict[str, torch.Tensor]:
            return collate([record_of(kind, number) for number in numbers])

        write_shards(directory, records, FAMILIES[kind], fields_of(kind), SHARD, rows_of)

    def open(self, directory: str, kind: str, batch: int) -> Any:
        from engine.data.format.reader import Shards

        return Shards(Path(directory), check_rows=self.checked)

    def open_served(self, address: str, directory: str, kind: str) -> Any:
        from engine.data.format.cache import ShardsCache
        from engine.data.format.remote import CachedShards, RangedShards
        from engine.storage import Storage

        storage = Storage(address)
        if self.window is None:
            return RangedShards(storage, check_rows=self.checked)
        self.kept = tempfile.TemporaryDirectory()
        return CachedShards(storage, ShardsCache(Path(self.kept.name)), 1, check_rows=self.checked)

    @contextlib.contextmanager
    def batches(self, shards: Any, batch: int, workers: int, start: int = 0) -> Iterator[Iterator[Any]]:
        from benchmarks.tools.drawing import draw

        with draw(shards, batch, range(start // batch, 10**9), self.window) as drawn, contextlib.closing(shards):
            yield (item.record for item in drawn)


class Mds:
    """MosaicML's streaming, in its default order."""

    def load(self) -> Any:
        """Imports the library, with torchvision, which it takes for data sets of others."""
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # built for CUDA, where torch is not: it lacks operators that nobody calls here
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
            self.operators = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                self.operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("streaming")

    def write(self, directory: Path, kind: str, records: int) -> None:
        columns = {name: f"ndarray:uint16:{','.join(map(str, shape))}" for name, (shape, _) in KINDS[kind].items()}
        with self.load().MDSWriter(out=str(directory), columns=columns, size_limit=CHUNK) as writer:
            for number in range(records):
                writer.write(record_of(kind, number))

    def open(self, directory: str, kind: str, batch: int) -> Any:
        streaming = self.load()
        streaming.base.util.clean_stale_shared_memory()
        return streaming.StreamingDataset(local=directory, shuffle=True, batch_size=batch, shuffle_seed=SEED)

    @contextlib.contextmanager
    def batches(self, dataset: Any, batch: int, workers: int, start: int = 0) -> Iterator[Iterator[Any]]:
        if start:
            dataset.load_state_dict(dataset.state_dict(start, True))
        yield endless(self.load().StreamingDataLoader(dataset, **loading(batch, workers), collate_fn=collate))


class WebDataset:
    """Tars, one after another; of a resumed epoch everything before is read and left aside."""

    def load(self) -> None:
        importlib.import_module("webdataset")

    def write(self, directory: Path, kind: str, records: int) -> None:
        import webdataset

        with webdataset.ShardWriter(f"{directory}/%05d.tar", maxcount=10**9, maxsize=CHUNK, verbose=0) as writer:
            for number in range(records):
                fields = {f"{name}.bin": value.tobytes() for name, value in record_of(kind, number).items()}
                writer.write({"__key__": f"{number:08d}", **fields})

    def open(self, directory: str, kind: str, batch: int) -> Any:
        return self._open(sorted(map(str, Path(directory).glob("*.tar"))), kind)

    def open_served(self, address: str, directory: str, kind: str) -> Any:
        return self._open([f"{address}/{path.name}" for path in sorted(Path(directory).glob("*.tar"))], kind)

    def _open(self, tars: list[str], kind: str) -> Any:
        import webdataset

        fields = KINDS[kind]

        def decode(sample: dict[str, Any]) -> dict[str, np.ndarray]:
            return {name: np.frombuffer(sample[f"{name}.bin"], np.uint16).reshape(fields[name][0]) for name in fields}

        dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=SEED, empty_check=False)
        return lambda skipped: dataset.shuffle(BUFFER).slice(skipped, sys.maxsize).map(decode)

    @contextlib.contextmanager
    def batches(self, dataset: Any, batch: int, workers: int, start: int = 0) -> Iterator[Iterator[Any]]:
        import webdataset

        batched = dataset(start // max(workers, 1)).batched(batch, collation_fn=collate, partial=False)
        yield endless(webdataset.WebLoader(batched, batch_size=None, num_workers=workers, persistent_workers=workers > 0))


class LitData:
    """Lightning's litdata, with tensors of one dimension, of which it stores no headers."""

    def load(self) -> None:
        importlib.import_module("litdata")

    def write(self, directory: Path, kind: str, records: int) -> None:
        import litdata

        litdata.optimize(
            functools.partial(_flat_record, kind), list(range(records)), str(directory), chunk_bytes=CHUNK, num_workers=1,
            verbose=False,
        )  # fmt: skip

    def open(self, directory: str, kind: str, batch: int) -> Any:
        import litdata

        dataset = litdata.StreamingDataset(directory, shuffle=True, drop_last=True, seed=SEED)
        len(dataset)
        return dataset

    @contextlib.contextmanager
    def batches(self, dataset: Any, batch: int, workers: int, start: int = 0) -> Iterator[Iterator[Any]]:
        import litdata

        loader = litdata.StreamingDataLoader(dataset, **loading(batch, workers))
        if start:
            loader.load_state_dict(self.state)
        yield endless(loader)

    def prepare_resume(self, dataset: Any, batch: int, workers: int, start: int) -> None:
        """Keeps the state of a loader that has come so far; it says it only then."""
        import litdata

        loader = litdata.StreamingDataLoader(dataset, **loading(batch, workers))
        for _ in itertools.islice(loader, start // batch):
            pass
        self.state = loader.state_dict()


def _flat_record(kind: str, number: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.view(np.int16).ravel()) for name, value in record_of(kind, number).items()}


def loading(batch: int, workers: int) -> dict[str, Any]:
    return {"batch_size": batch, "num_workers": workers, "drop_last": True, "persistent_workers": workers > 0}


def endless(loader: Any) -> Iterator[Any]:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader


SIDES: dict[str, Any] = {
    "engine": Engine(), "engine, rows not checked": Engine(checked=False), "engine, blocks": Engine(window=2),
    "MDS": Mds(), "WebDataset": WebDataset(), "litdata": LitData(),
}  # fmt: skip
PEERS = ("MDS", "WebDataset", "litdata")


def _tree(process: int) -> list[int]:
    """A process and those that it started."""
    children = [
        int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [process, *itertools.chain.from_iterable(map(_tree, children))]


def memory_bytes() -> int:
    """What this process and its workers hold, pages that they share counted once, and those of files not at all."""
    total = 0
    for process in _tree(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            said = Path(f"/proc/{process}/smaps_rollup").read_text()
            held = (line.split() for line in said.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
            total += sum(int(size) << 10 for _, size, _ in held)
    return total


def processor_seconds() -> float:
    """What this process and its workers spent so far."""
    ticks = 0
    for process in _tree(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def drop_from_cache(directory: str) -> None:
    """Has the kernel forget what it keeps of the files of a directory, which were synced."""
    for path in Path(directory).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(directory: str) -> None:
    for path in Path(directory).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass


def rate(batches: Iterator[Any], batch: int, seconds: float) -> tuple[float, float]:
    """Samples per second and the processor's microseconds per sample, for so long after a first batch."""
    next(batches)
    samples, started, busy = 0, time.perf_counter(), processor_seconds()
    while time.perf_counter() - started < seconds:
        next(batches)
        samples += batch
    return samples / (time.perf_counter() - started), (processor_seconds() - busy) / samples * 1e6


def in_a_child(work: Callable[[], float]) -> float:
    """What `work` gives in a process that is forked for it: at its end no page of a file is mapped any more."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return float(said)


def cold_rate(side: Any, kind: str, directory: str, records: int, batch: int, workers: int) -> float:
    """Samples per second over an epoch of which nothing lies in the page cache."""
    drop_from_cache(directory)
    reader = side.open(directory, kind, batch)
    with side.batches(reader, batch, workers) as batches:
        started = time.perf_counter()
        for _ in range(records // batch - max(workers, 1)):  # workers drop what is no whole batch
            next(batches)
        return (records // batch - max(workers, 1)) * batch / (time.perf_counter() - started)


def measure_served(
    side: Any, kind: str, directory: str, sizes: list[int], workers: int, seconds: float, address: str
) -> dict[str, Any]:
    """The figures of one side that reads over HTTP."""
    size = sizes[len(sizes) // 2]
    side.load()
    read_into_cache(directory)
    started = time.perf_counter()
    with side.batches(side.open_served(address, directory, kind), size, workers) as batches:
        next(batches)
        first = time.perf_counter() - started
        return {"http_first_batch_seconds": first, f"http_{size}": rate(batches, size, seconds)[0]}


def measure(
    side: Any, kind: str, directory: str, records: int, sizes: list[int], workers: int, seconds: float
) -> dict[str, Any]:
    """All figures of one side; rates over so many seconds."""
    middle_size = sizes[len(sizes) // 2]
    side.load()
    figures: dict[str, Any] = {
        f"cold_{size}": in_a_child(functools.partial(cold_rate, side, kind, directory, records, size, workers))
        for size in sizes
    }
    read_into_cache(directory)
    before, started = memory_bytes(), time.perf_counter()
    reader = side.open(directory, kind, middle_size)
    figures["open_seconds"] = time.perf_counter() - started
    with side.batches(reader, middle_size, workers) as batches:
        next(batches)
        figures["first_batch_seconds"] = time.perf_counter() - started
        rate(batches, middle_size, seconds)
        figures["memory_mib"] = (memory_bytes() - before) / 2**20
    for size in sizes:
        reader = batches = None
        reader = side.open(directory, kind, size)
        with side.batches(reader, size, workers) as batches:
            figures[f"warm_{size}"], figures[f"processor_microseconds_{size}"] = rate(batches, size, seconds)
    middle = records // 2 // middle_size * middle_size
    if hasattr(side, "prepare_resume"):
        side.prepare_resume(side.open(directory, kind, middle_size), middle_size, workers, middle)
    reader = batches = None
    gc.collect()
    started = time.perf_counter()
    reader = side.open(directory, kind, middle_size)
    with side.batches(reader, middle_size, workers, middle) as batches:
        next(batches)
        figures["resume_seconds"] = time.perf_counter() - started
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("write", "measure"))
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("records", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--address", help="measure what is read from there, where the directory is served")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a rate")
    options = parser.parse_args()
    side = SIDES[options.side]
    torch.set_num_threads(1)
    if options.work == "write":
        options.directory.mkdir(parents=True, exist_ok=True)
        side.write(options.directory, options.kind, options.records)
    else:
        given = (options.sizes, options.workers, options.seconds)
        of = (side, options.kind, str(options.directory))
        figures = measure_served(*of, *given, options.address) if options.address else measure(*of, options.records, *given)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
