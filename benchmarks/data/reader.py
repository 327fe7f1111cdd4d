"""What does the C++ shard reader gain over reading row by row in Python, and over memory-mapped numpy?

    python -m benchmarks.data.reader [--json FILE]

Counted before: a row costs two system calls and a copy; Python adds a few microseconds per row, so that small rows gain by
their number, and large batches only by the threads that copy side by side. Rows lie in the page cache here: the time of a
disk, which the advice to the kernel overlaps, is not in these figures.
"""

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import problem
from engine.data.format.gather import best_gather, gather_in_cpp, gather_in_python

# Rows of a batch as the families store them: (name, bytes of a row, rows).
SHAPES = [
    ("digits latent", 512 * 2, 64),
    ("sd latent, batch 16", 32 * 1024, 16),
    ("sd text states, batch 16", 77 * 768 * 2, 16),
    ("prior text states, batch 256", 77 * 1280 * 2, 256),
]
REPEATS = 30
FILE_BYTES = 2**28


def measure(file: int, mapped: np.ndarray, row_bytes: int, rows: int) -> dict[str, Any]:
    """Median microseconds of each side to gather `rows` rows from random places of a file."""

    def gather_from_map(files: np.ndarray, offsets: np.ndarray, row_bytes: int, target: torch.Tensor) -> None:
        view = target.numpy()
        for row, offset in enumerate(offsets):
            view[row] = mapped[offset : offset + row_bytes]

    sides = {"cpp": gather_in_cpp, "python": gather_in_python, "memmap": gather_from_map}
    generator = np.random.default_rng(0)
    target = torch.empty(rows, row_bytes, dtype=torch.uint8)
    files = np.full(rows, file, np.int32)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(REPEATS):
        for side in times:
            # Each side reads rows of its own: what another has just read would lie in the processor's cache.
            offsets = generator.integers(0, len(mapped) // row_bytes, rows) * row_bytes
            started = time.perf_counter()
            sides[side](files, offsets, row_bytes, target)
            times[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(values) * 1e6 for side, values in times.items()}
    return {"microseconds": medians, **{f"{side}_over_cpp": medians[side] / medians["cpp"] for side in ("python", "memmap")}}


def main() -> int:
    parser = command_line(__doc__)
    options = parser.parse_args()
    if best_gather() is not gather_in_cpp:
        return 1
    kept = Rows(options.json, __doc__, options.minutes)
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(os.urandom(2**20))
        file.flush()
        mapped = np.memmap(file.name, np.uint8, "r")
        for name, row_bytes, rows in SHAPES:
            work = partial(measure, file.fileno(), mapped, row_bytes, rows)
            row = kept.measure(name, 5, work, rows=rows, row_bytes=row_bytes, cores=os.cpu_count())
            print(f"{name:30}", problem(row) or f"cpp {row['microseconds']['cpp']:8.0f} us   "
                  f"python {row['python_over_cpp']:.2f} x   memmap {row['memmap_over_cpp']:.2f} x")  # fmt: skip
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
