"""How much host time does a step take beside its own work? `python -m benchmarks.steps.overhead [--steps N]`

The loop of `engine.loop.trainer` runs with a model of one weight, on batches that are ready. From a step's time, what the model
(forward and backward), the fused noise and loss, the optimizer and the loader take is subtracted; the rest is the loop's:
learning rate, flags, metrics, progress, signals. Target: under 150 microseconds.

On a GPU also, for SD 1.5 at 512 px with a batch of 8: kernels per step, and the share of a captured step in which the GPU
waits between two replays, from the profiler. Target: under 2 %.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from torch import Tensor, nn

from benchmarks.tools.levers import SHIPPED, Lever
from benchmarks.tools.published import open_random, open_tiny
from benchmarks.tools.rows import Rows
from benchmarks.tools.sides import WARM_UP, open_side, random_batch
from benchmarks.tools.timeline import profiled
from benchmarks.tools.timing import synchronize
from engine.loop.run import Run
from engine.loop.trainer import Training
from engine.models.family import Family
from engine.processes import Processes
from engine.quiet import quiet_libraries

SECONDS = 200  # that the row takes at most, most of them for torch.compile from cold caches
PARTS = {
    "model": ["engine.loop.step.predict_and_compare", "engine.loop.weights.flat.FlatPartition.backward"],
    "optimizer": ["engine.loop.optimizers.adamw.AdamW.apply"],
}


class Scale(nn.Module):
    """The smallest model: a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, noisy: Tensor) -> Tensor:
        return self.factor * noisy


class _Clock:
    """Adds up the seconds within functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        return timed


def _resolve(path: str) -> Any:
    """The function of a dotted path."""
    module, _, name = path.rpartition(".")
    holder = __import__(module, fromlist=[name]) if not module[module.rfind(".") + 1].isupper() else _resolve(module)
    return getattr(holder, name)


def host_microseconds(steps: int, windows: int = 5) -> dict[str, float]:
    """Median microseconds per step over windows: in all, of each part, and of the loop itself; on the host alone."""
    device = torch.device("cpu")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        options = {"output_dir": directory, "report_to": "none", "use_ema": True, "log_every": 10}
        family: Any = open_tiny("sd", Path(directory), train_batch_size=1, checkpointing_steps=10**9, **options)
        batch = random_batch(family, 1, device)
        predict = mock.patch.object(type(family), "predict", staticmethod(lambda model, noisy, timesteps, record: model(noisy)))
        with predict:
            for _ in range(windows):
                rows.append(_one_window(family, batch, steps))
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _one_window(family: Family, batch: Any, steps: int) -> dict[str, float]:
    clock = _Clock()

    patches: list[Any] = []
    for part, paths in PARTS.items():
        for path in paths:
            function = _resolve(path)
            timed = clock.around(part, function)
            patches.append(mock.patch(path, lambda *a, timed=timed, **k: timed(*a, **k)))
    run = Run(seed=7, global_batch=1, fingerprint="", records=10**6, steps=steps)
    training = Training(family.config, run, family, Scale(), Processes())
    for patch in patches:
        patch.start()
    try:
        started = time.perf_counter()
        training.run_steps(repeat(batch), None)
        total = time.perf_counter() - started
    finally:
        for patch in patches:
            patch.stop()
    if float(training.partition.optimizer.norm_and_skips()[1]):
        raise ValueError("steps were skipped: their time says nothing")
    parts = {part: seconds / steps * 1e6 for part, seconds in clock.seconds.items()}
    return {"step": total / steps * 1e6, **parts, "loop": total / steps * 1e6 - sum(parts.values())}


def device_gaps(family: Any, lever: Lever, size: int, device: torch.device, steps: int = 10) -> dict[str, float]:
    """Of a step: kernels, milliseconds, the share in which the device does nothing, and the host's time to launch it.

    On a CPU the profiler's operators stand in for kernels: a run of this path, no measurement.
    """
    with lever.applied():
        step = open_side(family, lever, size, device).step
        for _ in range(WARM_UP):
            step()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        launched = time.perf_counter() - started
        work, busy, total = profiled(step, steps, device)
    return {
        "kernels_per_step": len(work) / steps, "step_milliseconds": total / steps / 1000, "idle_share": 1 - busy / total,
        "launch_microseconds": launched / steps * 1e6,
    }  # fmt: skip


def measure(steps: int, device: torch.device) -> dict[str, Any]:
    """The host's time on a CPU; on a GPU what a captured step of SD 1.5 at batch 8 leaves idle."""
    if device.type == "cpu":
        return {"host_microseconds": host_microseconds(steps)}
    with tempfile.TemporaryDirectory() as directory:
        family = open_random("SD 1.5, 512 px", Path(directory), device, mixed_precision="bf16", output_dir=directory)
        return {"captured_step": device_gaps(family, SHIPPED, 8, device)}


def table(row: dict[str, Any]) -> str:
    """A Markdown table."""
    if absent := row.get("failed") or row.get("missing"):
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
    parser = argparse.ArgumentParser("benchmarks.steps.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps per window (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="keep the row there; what is there is not measured again")
    parser.add_argument("--minutes", type=float, help="begin nothing that would not end within so many minutes")
    options = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = "SD 1.5, captured, batch 8" if device.type == "cuda" else "the loop around a model of one weight"
    rows = Rows(options.json, __doc__, options.minutes)
    print(table(rows.measure(name, SECONDS, partial(measure, options.steps, device))))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
