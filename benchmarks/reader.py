"""What does the C++ shard reader gain over reading row by row in Python, and over memory-mapped numpy?

    python -m benchmarks.reader [--output FILE]

Counted before: a row costs two system calls and a copy; Python adds a few microseconds per row, so that small rows gain by
their number, and large batches only by the threads that copy side by side. Rows lie in the page cache here: the time of a
disk, which the advice to the kernel overlaps, is not in these figures.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import RESULTS, write_result
from engine.data.reader import best_gather, gather_in_cpp, gather_in_python

# Rows of a batch as the families store them: (name, bytes of a row, rows).
SHAPES = [
    ("digits latent", 512 * 2, 64),
    ("sd latent, batch 16", 32 * 1024, 16),
    ("sd text states, batch 16", 77 * 768 * 2, 16),
    ("prior text states, batch 256", 77 * 1280 * 2, 256),
]
REPEATS = 30


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.reader", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "reader-cpu.json")
    output = parser.parse_args().output
    if best_gather() is not gather_in_cpp:
        return 1
    results = []
    with tempfile.NamedTemporaryFile() as file:
        total = 256 * 2**20
        file.write(os.urandom(2**20) * (total // 2**20))
        file.flush()
        descriptor = os.open(file.name, os.O_RDONLY)
        mapped = np.memmap(file.name, np.uint8, "r")

        def gather_from_map(files: np.ndarray, offsets: np.ndarray, row_bytes: int, target: torch.Tensor) -> None:
            view = target.numpy()
            for row, offset in enumerate(offsets):
                view[row] = mapped[offset : offset + row_bytes]

        sides = {"cpp": gather_in_cpp, "python": gather_in_python, "memmap": gather_from_map}
        generator = np.random.default_rng(0)
        for name, row_bytes, rows in SHAPES:
            target = torch.empty(rows, row_bytes, dtype=torch.uint8)
            files = np.full(rows, descriptor, np.int32)
            times: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(REPEATS):
                for side in times:
                    # Each side reads rows of its own: what another has just read would lie in the processor's cache.
                    offsets = generator.integers(0, total // row_bytes, rows) * row_bytes
                    started = time.perf_counter()
                    sides[side](files, offsets, row_bytes, target)
                    times[side].append(time.perf_counter() - started)
            medians = {side: statistics.median(values) * 1e6 for side, values in times.items()}
            gains = {f"{side}_over_cpp": medians[side] / medians["cpp"] for side in ("python", "memmap")}
            results.append({"rows": rows, "row_bytes": row_bytes, "shape": name, "microseconds": medians, **gains})
            print(f"{name:30} cpp {medians['cpp']:8.0f} us   python {gains['python_over_cpp']:.2f} x   "
                  f"memmap {gains['memmap_over_cpp']:.2f} x")  # fmt: skip
        os.close(descriptor)
    write_result(output, __doc__, cores=os.cpu_count(), repeats=REPEATS, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
