"""How fast is a training step, and what does each lever give? `python -m benchmarks.steps.step [--checkpoints NAME...]`

Per checkpoint (the published sizes with random weights, over a batch that stays on the device) one row per lever and batch; the
levers are `LEVERS`: the diffusers recipe (benchmarks/tools/plain.py), the engine, each with what the one before has, up to what
ships; and levers that take one thing from what ships. Rows that leave the defaults alone are what a user gets, with and
without `--compile`.

Each row is kept in FILE the moment it is measured, and a further call goes on with what is missing (exit code 75 says that
something is): with `--minutes`, no row begins that would not end in time. A row fails, and only it, unless its optimizer moved
the weights, skipped no step and left everything finite, and where steps should be captured, unless the graph was there before
the first window.

Batches are the largest powers of two, up to `AIMS`, for which the recipe's memory should fit the card (`largest_batch`). Where
the recipe then still runs out of memory, every lever of that checkpoint takes half the batch, so that ratios stay fair.

Each row is then profiled: every kernel of some further steps is put into a category by its name
(`benchmarks.tools.profile`), the rest of the time is idle.

Model FLOP utilisation is against a matrix product of the same precision measured beforehand, and against the card's data
sheet. `--tiny` takes models of a few thousand weights, to try the
benchmark itself.
"""

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from tqdm import tqdm

from benchmarks.tools import profile
from benchmarks.tools.checkpoints import AIMS, PRECISION, Checkpoint, opened
from benchmarks.tools.cost import Cost
from benchmarks.tools.levers import LEVERS, Lever
from benchmarks.tools.published import TINY
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept, settle_attention
from benchmarks.tools.sides import WARM_UP, check, open_side, sample
from benchmarks.tools.tables import OUT_OF_MEMORY
from benchmarks.tools.timing import data_sheet_flops_per_second, spread, synchronize
from benchmarks.tools.waterfall import table
from engine.backends import keep_compiled_code
from engine.errors import exit_code
from engine.loop.flops import matrix_flops_per_second
from engine.models.encoder import PRECISIONS
from engine.quiet import quiet_libraries

WINDOWS = 5
WINDOW_SECONDS = 1.2  # or one step, where that takes longer


def measure_lever(checkpoint: Checkpoint, lever: Lever, size: int, window_seconds: float) -> dict[str, Any]:
    """Samples per second (median and quartiles over windows), the loss, peak memory, and where the time goes.

    Raises:
        RuntimeError: a step did not do what it should; and whatever a step raises.
    """
    try:
        with settings_kept():
            return timed(checkpoint, lever, size, window_seconds)
    finally:
        torch._dynamo.reset()


def timed(checkpoint: Checkpoint, lever: Lever, size: int, window_seconds: float) -> dict[str, Any]:
    """As `measure_lever`, with torch's settings as the lever leaves them."""
    device = checkpoint.device
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    side = open_side(checkpoint, lever, size)
    before = sample(side.weights)
    for _ in range(WARM_UP):
        side.step()
    graphs = side.graphs()
    synchronize(device)
    ready = time.perf_counter()
    side.step()
    synchronize(device)
    steps = max(1, math.ceil(window_seconds / (time.perf_counter() - ready)))
    rates = []
    for _ in range(WINDOWS):
        synchronize(device)
        window = time.perf_counter()
        for _ in range(steps):
            side.step()
        synchronize(device)
        rates.append(steps * size / (time.perf_counter() - window))
    if gpu:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    profiled = profile.measure(side.step, device)
    row: dict[str, Any] = dict(zip(("samples_per_second", "low", "high"), spread(rates), strict=True))
    row |= {"steps_per_window": steps, "ready_seconds": ready - started, "graphs": graphs, "profile": profiled}
    if gpu:
        row |= {"memory_gib": allocated / 2**30, "reserved_gib": reserved / 2**30}
    if side.graphs() != graphs:
        raise RuntimeError("a graph was captured within a window")
    return row | check(side, before)


def expected_seconds(lever: Lever, cost: Cost, size: int, cached_code: bool) -> float:
    """How long a row should take on an H100. Meant to be too long rather than too short:

    - 10 s to draw weights, open the training and profile it, 15 more for cuDNN's search where it is made (34 s were seen of the
      decoder's at 768 px), 15 for the encoders (up to 2.5 billion weights);
    - torch.compile from cold caches 0.14 s per million parameters (107 s were seen for SD), five times that for
      max-autotune; 25 s with warm ones, mostly tracing (assumed);
    - steps at 25 % of 800 TFLOP/s, with encoders twice as long; and windows of `WINDOW_SECONDS`, or of one step.
    """
    opening = 10 + 15 * (lever.cudnn_benchmark is not False) + 15 * lever.encoders
    cold = 0.14e-6 * cost.parameters * (5 if "compile_mode" in (lever.options or {}) else 1)
    compiling = (min(25, cold) if cached_code else cold) if lever.compiles else 0.0
    step = size * cost.training_flops / (0.25 * 800e12) * (1 + lever.encoders)
    return opening + compiling + (WARM_UP + 1) * step + WINDOWS * max(WINDOW_SECONDS + step, step)


def row_name(checkpoint: str, lever: Lever, size: int) -> str:
    return f"{checkpoint}: {lever.name}, batch {size}"


@dataclass
class Waterfall:
    """The levers of a checkpoint, one after another.

    peak: operations per second of a matrix product, as `measured_peak` says.
    warm: the caches hold what is compiled.
    """

    checkpoint: Checkpoint
    peak: dict[str, Any]
    rows: Rows
    warm: bool = False

    def measure_all(self, levers: list[Lever], size: int) -> list[dict[str, Any]]:
        """A row for every lever; at half the batch where the recipe needs too much memory."""
        measured: list[dict[str, Any]] = []
        seen: list[Any] = []
        for lever in tqdm(levers, desc=f"{self.checkpoint.name}, batch {size}", disable=None, leave=False):
            row = self.measure(lever, size, self.warm or lever.form in seen)
            measured.append(row)
            # Rows of an earlier call may be another machine's.
            if row_name(self.checkpoint.name, lever, size) in self.rows.begun:
                seen.append(lever.form)
            if lever.options is None and row.get("failed") == OUT_OF_MEMORY and size > 1:
                return measured + self.measure_all(levers, size // 2)
        return measured

    def measure(self, lever: Lever, size: int, cached_code: bool) -> dict[str, Any]:
        checkpoint, cost = self.checkpoint, self.checkpoint.cost

        def work() -> dict[str, Any]:
            row = measure_lever(checkpoint, lever, size, 0.0 if checkpoint.tiny else WINDOW_SECONDS)
            flops = row["samples_per_second"] * cost.training_flops
            row |= {"training_flops_per_sample": cost.training_flops, "bytes_per_step": cost.bytes_per_step(size)}
            return row | {f"mfu_{kind}": flops / value for kind, value in self.peak.items() if value}

        config = checkpoint.family.config
        about = {"checkpoint": checkpoint.name, "family": config.family, "lever": lever.name, "batch": size,
                 "settings": lever.settings, "precision": config.mixed_precision}  # fmt: skip
        seconds = 5.0 if checkpoint.tiny else expected_seconds(lever, cost, size, cached_code)
        return self.rows.measure(row_name(checkpoint.name, lever, size), seconds, work, **about)


def measured_peak(rows: Rows, device: torch.device, precision: str) -> dict[str, Any]:
    """Operations per second of a matrix product, `measured` here and by the card's `data_sheet`; None where unknown."""

    def work() -> dict[str, Any]:
        promised = data_sheet_flops_per_second(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return {"measured": matrix_flops_per_second(device, PRECISIONS[precision]), "data_sheet": promised}

    row = rows.measure(f"matrix product, {precision}", 10, work, settings={})
    return {kind: row.get(kind) for kind in ("measured", "data_sheet")}


def measure_all(
    rows: Rows,
    names: list[str],
    device: torch.device,
    batch: int | None = None,
    wanted: Iterable[str] = (),
    warm: bool = False,
) -> list[dict[str, Any]]:
    """Every checkpoint, or tiny family, in turn.

    Args:
        batch: of the waterfalls, instead of each checkpoint's own.
        wanted: names of levers; none for all.
        warm: the caches hold what is compiled.
    """
    settle_attention(device)
    peak = measured_peak(rows, device, PRECISION[device.type])
    measured = []
    for name in names:
        with opened(name, device) as checkpoint:
            waterfall, family = Waterfall(checkpoint, peak, rows, warm), checkpoint.family.config.family
            levers = [lever for lever in LEVERS if lever.fits(family) and (not wanted or lever.name in wanted)]
            measured += waterfall.measure_all(levers, batch or checkpoint.batch)
    return measured


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead of the published size")
    parser.add_argument("--checkpoints", nargs="+", choices=[*AIMS, *TINY], help="default: all")
    parser.add_argument("--levers", nargs="+", choices=[lever.name for lever in LEVERS], default=[], help="default: all")
    parser.add_argument("--batch", type=int, help="batch of the waterfall, instead of each checkpoint's own")
    parser.add_argument("--warm", action="store_true", help="the caches hold what is compiled: expect shorter rows")
    parser.add_argument("--compile_cache_dir", type=Path, help="keep compiled code there (default: as torch's variables say)")
    options = parser.parse_args()
    quiet_libraries()
    if options.compile_cache_dir:
        keep_compiled_code(options.compile_cache_dir)
    device = this_device()
    names = options.checkpoints or (list(TINY) if options.tiny else list(AIMS))
    rows = Rows(options.json, __doc__, options.minutes)
    measured = measure_all(rows, names, device, options.batch, options.levers, options.warm)
    print(table(measured), profile.table(measured), sep="\n\n")
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(exit_code("benchmarks.steps.step", main))
