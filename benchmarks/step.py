"""How fast is a training step, and what does each lever give? `python -m benchmarks.step [--tiny] [--sweep] [--batch N]`

Per checkpoint (the published sizes with random weights, over a batch that stays on the device), levers are pulled one after
another, each on top of those before it:

    encoders in the loop     the diffusers recipe with its best flags (benchmarks/plain.py)
    cached                   the same on latents
    bf16, channels last      the engine: bf16 weights, training form without stacked projections, fused noise, loss and AdamW
    attention                projections of the same tokens stacked into one matrix product
    compiled                 torch.compile, group normalisation left to inductor
    fused norms              engine::group_norm_silu instead
    graphs                   the whole step captured, with the faster of the two

`--sweep` runs the last one at further batch sizes. Model FLOP utilisation is against a matrix product of the same
precision measured in the same run. `--tiny` takes models of a few thousand weights to try the benchmark itself.
"""

import argparse
import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from tqdm import tqdm

from benchmarks.environment import write_result
from benchmarks.plain import PlainTraining
from benchmarks.published import TINY, open_random, open_tiny
from benchmarks.sizes import Cost, count
from benchmarks.timing import spread, synchronize
from engine.data.loader import Batch, BatchPlan
from engine.loop.metrics import matrix_flops_per_second
from engine.loop.trainer import Training
from engine.models.family import PRECISIONS, Family
from engine.models.training_form import to_training_form
from engine.processes import Processes
from engine.quiet import quiet_libraries

# Checkpoint -> batch of the waterfall, and further ones of the sweep.
BATCHES = {
    "SD 1.5, 512 px": (32, [8, 16, 64]),
    "Kandinsky 2.2 prior": (128, [32, 256]),
    "Kandinsky 2.2 decoder, 512 px": (32, [8, 64]),
    "Kandinsky 2.2 decoder, 768 px": (16, [4, 32]),
    "Wuerstchen v2 prior, 768 px": (32, [8, 64]),
}
WARM_UP = 6  # three steps as they are, one to capture, two replays
WINDOWS = 5


@dataclass(frozen=True)
class Lever:
    name: str
    encoders: bool = False
    engine: bool = False
    stacked: bool = False
    compiled: bool = False
    norms: bool = False
    graphs: bool = False


LEVERS = [
    Lever("encoders in the loop", encoders=True),
    Lever("cached"),
    Lever("bf16, channels last", engine=True),
    Lever("attention", engine=True, stacked=True),
    Lever("compiled", engine=True, stacked=True, compiled=True),
    Lever("fused norms", engine=True, stacked=True, compiled=True, norms=True),
    Lever("graphs", engine=True, stacked=True, compiled=True, graphs=True),
]


def random_batch(family: Family, size: int, device: torch.device) -> Batch:
    """Random records of the family, with the timesteps and coefficients of the first slots."""
    record = {}
    for name, field in family.record_spec.items():
        values = torch.randn(size, *field.shape, device=device)
        record[name] = (values.abs() if name == family.std else values).to(field.dtype)
    seed, slots = torch.tensor([7]), torch.arange(size)
    timesteps = family.schedule.draw(seed, slots)
    return Batch(record, slots.to(device), timesteps.to(device), family.schedule.coefficients(timesteps).to(device))


@contextlib.contextmanager
def form(lever: Lever, compile_backend: str) -> Iterator[None]:
    """Models built and traced inside have the form that the lever asks for."""

    def shape(model: Any, fuse_projections: bool) -> None:
        if lever.engine:
            to_training_form(model, lever.stacked)

    norms, compile_module = lever.norms, torch.nn.Module.compile

    def fuses_norms(x: Any) -> bool:
        return norms

    with (
        mock.patch("engine.models.family.to_training_form", shape),
        mock.patch("engine.models.training_form.fuses_norms", fuses_norms),
        mock.patch("torch.nn.Module.compile", lambda module: compile_module(module, backend=compile_backend)),
    ):
        yield


def open_step(family: Any, lever: Lever, batch: Batch, device: torch.device) -> tuple[Callable[[], Any], Cost]:
    """One optimizer step with a lever, ready to be called, and what it must cost."""
    if not lever.engine:
        model = family.load_model().to(device)
        return PlainTraining(family, model, batch, lever.encoders, device).step, count(family, model)
    size = len(batch.slots)
    options = {"compile": lever.compiled, "cuda_graphs": "on" if lever.graphs else "off", "use_ema": True}
    config = family.training.model_copy(update={**options, "train_batch_size": size})
    run = {"seed": 7, "global_batch": size, "fingerprint": ""}
    training = Training(config, family, range(1000), BatchPlan(size, 1, 0, 1), Processes(), run, 1000)  # type: ignore[arg-type]
    batches = repeat(batch)
    return (lambda: training._train_step(batches, 1e-5)), count(family, training.partition.module)


def measure_lever(family: Any, lever: Lever, size: int, device: torch.device, steps: int, backend: str) -> dict[str, Any]:
    """Samples per second (median and quartiles over windows), what a sample costs, and peak memory; or why there are none."""
    row: dict[str, Any] = {"lever": lever.name, "batch": size}
    if lever.graphs and device.type != "cuda":
        return row | {"missing": "no GPU"}
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = None
    try:
        with form(lever, backend):
            step, cost = open_step(family, lever, random_batch(family, size, device), device)
            for _ in range(WARM_UP):
                step()
            rates = []
            for _ in range(WINDOWS):
                synchronize(device)
                started = time.perf_counter()
                for _ in range(steps):
                    step()
                synchronize(device)
                rates.append(steps * size / (time.perf_counter() - started))
        row |= dict(zip(("samples_per_second", "low", "high"), spread(rates), strict=True))
        row |= {"training_flops_per_sample": cost.training_flops, "bytes_per_step": cost.bytes_per_step(size)}
        if device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.OutOfMemoryError:
        row["missing"] = "out of memory"
    finally:
        if lever.encoders:
            family.free_encoders()
        step = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def measure(
    name: str, family: Any, sizes: list[int], device: torch.device, steps: int, backend: str, deadline: float
) -> dict[str, Any]:
    """The waterfall of a checkpoint at the first batch size, and its last lever at the others, as far as the time goes.

    Args:
        deadline: `time.monotonic` after which nothing further is begun.
    """
    has_norms = family.config.family in ("sd", "kandinsky-decoder")
    rows: list[dict[str, Any]] = []
    work = [(lever, sizes[0]) for lever in LEVERS if has_norms or not lever.norms]
    work += [(LEVERS[-1], size) for size in sizes[1:]]
    for lever, size in tqdm(work, desc=name, disable=None, leave=False):
        if lever.graphs:
            rates = {row["lever"]: row.get("samples_per_second", 0.0) for row in rows}
            lever = replace(lever, norms=rates.get("fused norms", 0.0) > rates.get("compiled", 0.0))
        if time.monotonic() > deadline:
            rows.append({"lever": lever.name, "batch": size, "missing": "no time left"})
        else:
            rows.append(measure_lever(family, lever, size, device, steps, backend))
    return {"checkpoint": name, "family": family.config.family, "rows": rows}


def measure_all(
    names: list[str], tiny: bool, sizes: dict[str, list[int]], device: torch.device, steps: int, minutes: float
) -> dict[str, Any]:
    """Every checkpoint (or tiny family) in turn; `sizes` are its batch sizes, that of the waterfall first."""
    precision = "bf16" if device.type == "cuda" else "no"
    deadline = time.monotonic() + 60 * minutes
    peak = matrix_flops_per_second(device, PRECISIONS[precision])
    # Inductor takes minutes for a UNet on a CPU; trying the benchmark needs none of its code.
    backend = "aot_eager" if tiny else "inductor"
    results = []
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            options = {"mixed_precision": precision, "output_dir": directory}
            family = (
                open_tiny(name, Path(directory), **options) if tiny else open_random(name, Path(directory), device, **options)
            )
            results.append(measure(name, family, sizes[name], device, steps, backend, deadline))
    for result in results:
        for row in result["rows"]:
            if "samples_per_second" in row:
                row["mfu"] = row["samples_per_second"] * row["training_flops_per_sample"] / peak
    return {"precision": precision, "compile_backend": backend, "matrix_flops_per_second": peak, "results": results}


def table(measured: dict[str, Any]) -> str:
    """The waterfalls as a Markdown table."""
    lines = ["| model | lever | batch | samples/s | quartiles | against the recipe | MFU | memory GiB |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for result in measured["results"]:
        recipe = result["rows"][0].get("samples_per_second")
        for row in result["rows"]:
            start = f"| {result['checkpoint']} | {row['lever']} | {row['batch']} |"
            if "missing" in row:
                lines.append(f"{start} {row['missing']} | | | | |")
                continue
            rate = row["samples_per_second"]
            ratio = f"{rate / recipe:.2f}" if recipe else ""
            mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
            memory = f"{row['memory_gib']:.1f}" if "memory_gib" in row else ""
            lines.append(f"{start} {rate:.4g} | {row['low']:.4g} to {row['high']:.4g} | {ratio} | {mfu} | {memory} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead of the published size")
    parser.add_argument("--checkpoints", nargs="+", choices=[*BATCHES, *TINY], help="default: all")
    parser.add_argument("--batch", type=int, help="batch of the waterfall, instead of each checkpoint's own")
    parser.add_argument("--sweep", action="store_true", help="measure further batch sizes too")
    parser.add_argument("--steps", type=int, default=10, help="steps per window (default: 10)")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing further after so long (default: 60)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = options.checkpoints or (list(TINY) if options.tiny else list(BATCHES))
    sizes = {}
    for name in names:
        first, further = BATCHES.get(name, (4, [2]))
        sizes[name] = [options.batch or first, *(further if options.sweep else [])]
    measured = measure_all(names, options.tiny, sizes, device, options.steps, options.minutes)
    print(table(measured))
    write_result(options.json, __doc__, **measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
