"""How many samples per second can the loader give? `python -m benchmarks.data.loader [--records N ...] [--batch B ...]`

Shards of small random rows (two of 1280 bf16 values per record, the embeddings of the Kandinsky prior) are written to a
temporary directory, and the loader's micro-batches are taken as fast as they come. The rows lie in the page cache: what is
measured is the order, the draws, the gathering, the handover and, on a GPU, the copies. Counts of records just above a power
of four are the worst for the cycle walking of the order. `--streams` mixes as many, of shares from 1 to as many; a further row
replaces a tenth of the conditions. Target on two CPU cores, for one stream: 20,000 samples per second at batch 16, 40,000 at
64.

The last line is the slowest row as JSON.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.drawing import draw
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.shards import FAMILIES, fields_of, write_shards
from benchmarks.tools.tables import problem
from benchmarks.tools.timing import synchronize
from engine.data.format.reader import Shards
from engine.data.samples.batch import Batch

RECORDS = [4096, 65_537, 70_000, 100_000]
BATCHES = [16, 64]
WINDOWS, WINDOW_SECONDS = 7, 1.0


def measure(shards: Shards, batch: int, streams: int, dropped: float, device: torch.device) -> dict[str, Any]:
    """Milliseconds to the first micro-batch, samples per second (the median over windows, and the slowest), and the processor's
    microseconds per sample over all threads, which other work on the machine changes least."""
    started = time.perf_counter()
    with draw(shards, batch, device=device, streams=streams, dropped=dropped) as batches:
        next(batches)
        first = time.perf_counter() - started
        _window(batches, device)
        rates, busy = zip(*(_window(batches, device) for _ in range(WINDOWS)), strict=True)
    return {
        "records": len(shards), "batch": batch, "streams": streams, "dropped": dropped, "first_milliseconds": first * 1e3,
        "samples_per_second": statistics.median(rates), "slowest_window": min(rates),
        "processor_microseconds": statistics.median(busy),
    }  # fmt: skip


def _window(batches: Iterator[Batch], device: torch.device) -> tuple[float, float]:
    """Samples per second, and the processor's microseconds per sample."""
    samples, started, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < WINDOW_SECONDS:
        samples += len(next(batches).slots)
    synchronize(device)
    return samples / (time.perf_counter() - started), (time.process_time() - busy) / samples * 1e6


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['samples_per_second']:,.0f} samples/s, {row['processor_microseconds']:.1f} us of processor time each, "
        f"the first after {row['first_milliseconds']:.1f} ms"
    )


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=RECORDS, help="default: %(default)s")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="default: %(default)s")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 100], help="default: %(default)s")
    options = parser.parse_args()
    device = this_device()
    rows, measured = Rows(options.json, __doc__, options.minutes), []
    for records in options.records:
        with tempfile.TemporaryDirectory() as directory:
            write_shards(Path(directory), records, FAMILIES["prior"], fields_of("prior"))
            shards = Shards(Path(directory))
            kinds = [*((streams, 0.0) for streams in options.streams), (1, 0.1)]
            for batch, (streams, dropped) in itertools.product(options.batch, kinds):
                mixed = f", {streams} streams" if streams > 1 else ", conditions dropped" if dropped else ""
                name, expected = f"{records} records, batch {batch}{mixed}", (WINDOWS + 2) * WINDOW_SECONDS
                row = rows.measure(name, expected, partial(measure, shards, batch, streams, dropped, device))
                measured.append(row)
                print(name, problem(row) or describe(row), sep=": ")
    print(json.dumps(min(measured, key=lambda row: row.get("samples_per_second", 0))))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
