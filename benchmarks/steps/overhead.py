"""How much host time does a step take beside its own work? `python -m benchmarks.steps.overhead [--steps N]`

The loop of `engine.loop.trainer` runs with a model of one weight, on batches that are ready. From a step's time, what the same
parts take when they are called alone is subtracted: the model (forward and backward, with the fused noise and loss), and the
optimizer. The rest is the loop's: learning rate, flags, metrics, progress, signals. Target: under 150 microseconds.

On a GPU also, for SD 1.5 at 512 px with a batch of 8: kernels per step, and the share of a captured step in which the GPU
waits between two replays, from the profiler. Target: under 2 %.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from torch import Tensor, nn

from benchmarks.tools.checkpoints import Checkpoint, opened
from benchmarks.tools.levers import SHIPPED, Lever
from benchmarks.tools.planned import SMALL_BATCH
from benchmarks.tools.published import open_tiny
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept
from benchmarks.tools.sides import WARM_UP, open_side, open_training, random_batch
from benchmarks.tools.tables import problem
from benchmarks.tools.timeline import profiled
from benchmarks.tools.timing import synchronize
from engine.data.samples.loader import Batch
from engine.models.family import Family
from engine.models.stable_diffusion import StableDiffusion
from engine.quiet import quiet_libraries

SECONDS = 60  # that the row should take with compiled code in the caches; from cold ones 110 more


class Scale(nn.Module):
    """The smallest model: a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, noisy: Tensor) -> Tensor:
        return self.factor * noisy


class OneWeight(StableDiffusion):
    """A family whose model is that factor; records, schedule and loss are Stable Diffusion's."""

    @staticmethod
    def predict(model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, record: dict[str, Tensor]) -> Tensor:
        return model(noisy)


def host_microseconds(steps: int, windows: int = 5) -> dict[str, float]:
    """Median microseconds per step over windows: in all, of each part, and of the loop itself; on the host alone."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"output_dir": directory, "report_to": "none", "log_every": 10, "checkpointing_steps": 10**9}
        family = OneWeight(open_tiny("sd", Path(directory), **options).config)
    batch = random_batch(family, 1, torch.device("cpu"))
    rows = [_one_window(family, batch, steps) for _ in range(windows)]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _one_window(family: Family, batch: Batch, steps: int) -> dict[str, float]:
    """The loop, and then its parts by turns without it, so often each."""
    training = open_training(family, Scale(), batch.slots.device, 1, steps)
    step, partition = training.train_step, training.partition

    started = time.perf_counter()
    training.run_steps(repeat(batch), None)
    total = time.perf_counter() - started
    if float(partition.optimizer.norm_and_skips()[1]):
        raise ValueError("steps were skipped: their time says nothing")
    model = optimizer = 0.0
    for _ in range(steps):
        started = time.perf_counter()
        _, prediction, gradient = step.compare(partition.predict, batch)
        partition.backward(prediction, gradient, first=True)
        between = time.perf_counter()
        partition.update(last=True)
        model, optimizer = model + between - started, optimizer + time.perf_counter() - between
    parts = {"step": total, "model": model, "optimizer": optimizer, "loop": total - model - optimizer}
    return {part: seconds / steps * 1e6 for part, seconds in parts.items()}


def device_gaps(checkpoint: Checkpoint, lever: Lever, size: int, steps: int = 10) -> dict[str, float]:
    """Of a step: kernels, milliseconds, the share in which the device does nothing, and the host's time to launch it.

    On a CPU the profiler's operators stand in for kernels: a run of this path, no measurement.
    """
    device = checkpoint.device
    with settings_kept():
        step = open_side(checkpoint, lever, size).step
        for _ in range(WARM_UP):
            step()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        launched = time.perf_counter() - started
        work, busy, total, _ = profiled(step, steps, device)
    return {
        "kernels_per_step": len(work) / steps, "step_milliseconds": total / steps / 1000, "idle_share": 1 - busy / total,
        "launch_microseconds": launched / steps * 1e6,
    }  # fmt: skip


def measure(steps: int, device: torch.device) -> dict[str, Any]:
    """The host's time on a CPU; on a GPU what a captured step of SD 1.5 at batch 8 leaves idle."""
    if device.type == "cpu":
        return {"host_microseconds": host_microseconds(steps)}
    with opened("SD 1.5, 512 px", device) as checkpoint:
        return {"captured_step": device_gaps(checkpoint, SHIPPED, SMALL_BATCH)}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each row."""
    return "\n\n".join(map(_table_of, rows))


def _table_of(row: dict[str, Any]) -> str:
    if absent := problem(row):
        return f"not measured: {absent}"
    lines = ["| part of a step | microseconds |", "|---|---|"]
    lines += [f"| {part} | {value:.0f} |" for part, value in row.get("host_microseconds", {}).items()]
    if "captured_step" in row:
        gaps = row["captured_step"]
        lines.append(
            f"\n{gaps['kernels_per_step']:.0f} kernels in a captured step of {gaps['step_milliseconds']:.1f} ms, of which the "
            f"GPU idles for {gaps['idle_share']:.2%}; the host launches it in {gaps['launch_microseconds']:.0f} microseconds."
        )
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="steps per window (default: %(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    name = "SD 1.5, captured, batch 8" if device.type == "cuda" else "the loop around a model of one weight"
    rows = Rows(options.json, __doc__, options.minutes)
    print(table([rows.measure(name, SECONDS, partial(measure, options.steps, device))]))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
