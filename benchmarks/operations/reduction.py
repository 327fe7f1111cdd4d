"""What does adding up gradients over processes in bf16 cost? `python -m benchmarks.operations.reduction [--json FILE]`

A simulation on the CPU. N processes hold gradients in the precision in which the backward pass left them, and their mean is
computed as DeepSpeed 0.19.8 and the collectives below it do:

- Each process divides by N first: at stages 1 and 2 in the gradients' own precision, which the buckets have, at stage 3 in that
  of the reduction. By a power of two that is exact in bf16. `gradient_predivide_factor` would move a part of it behind the
  sum, but any other than 1 is refused together with `reduce_scatter`, which is on.
- The sum travels in `communication_data_type`, by default that of the weights: every hop adds to what came, and rounds. A ring
  adds N - 1 times in a row (a reduce-scatter is one); a tree in a chain of the 8 processes of a node and then over pairs.
- Stages 1 and 2 round the sum to the gradients' precision when they copy it back (`fp32, rounded`). At stage 3, and where
  stage 2 accumulates in fp32 (`grad_accum_dtype`), it stays as it is (`fp32`).

The error is relative to the exact mean of the same gradients, L2 over elements. The gradients differ in how those of the
processes are related; noise is normal, independent, and in units of the mean, which is normal over elements:

- `equal`: all have the same; `noise 0.1`, `noise 0.5`, `noise 1`, `noise 10`: a mean and noise; `noise alone`: no mean;
- `equal signs`: the mean times what is uniform in 0.5 to 1.5;
- `wide range`: noise, of which each process's size and each element's is log-normal, a factor of 20 either way.

`--model` adds gradients of a tiny Stable Diffusion, of which each process has a micro-batch of 4 random records, before
training and after 100 steps, and says how large their noise is in units of their mean.

fp16 gradients are scaled so that the largest is near the largest number, as the loss scale comes to do; small ones lose digits
when they are divided.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from torch import Tensor

from benchmarks.tools.published import open_tiny
from benchmarks.tools.rows import write_result
from benchmarks.tools.sides import batch_of, open_training, random_records
from engine.loop.step import predict_and_compare
from engine.quiet import quiet_libraries

WORLDS = [8, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
ELEMENTS = 4096
PER_NODE = 8


def with_noise(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda mean, noise: mean + scale * noise


def wide_range(mean: Tensor, noise: Tensor) -> Tensor:
    sizes = [torch.randn(shape, generator=_generator(1)) for shape in ((len(noise), 1), (1, noise.shape[1]))]
    return noise * (3.0 * sizes[0]).exp() * (3.0 * sizes[1]).exp()


# Name -> the gradients of all processes [N, elements] from a mean [1, elements] and independent noise [N, elements].
STRUCTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "equal": lambda mean, noise: mean.expand_as(noise),
    "noise 0.1": with_noise(0.1),
    "noise 0.5": with_noise(0.5),
    "noise 1": with_noise(1.0),
    "noise 10": with_noise(10.0),
    "noise alone": lambda mean, noise: noise,
    "equal signs": lambda mean, noise: mean * (0.5 + torch.special.ndtr(noise)),
    "wide range": wide_range,
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring(parts: Tensor) -> Tensor:
    """The sum of [N, elements], one after another, rounded to their precision every time."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def tree(parts: Tensor) -> Tensor:
    """The same by a chain within each node and then over pairs."""
    sums = torch.stack([ring(node) for node in parts.split(PER_NODE)])
    while len(sums) > 1:
        pairs = sums[: len(sums) // 2 * 2]
        sums = torch.cat([pairs[::2] + pairs[1::2], sums[len(pairs) :]])
    return sums[0]


def error(mean: Tensor, gradients: Tensor) -> float:
    """The L2 distance of a computed mean from that of `gradients` [N, elements], relative to it."""
    exact = gradients.double().mean(0)
    return float((mean.double() - exact).norm() / exact.norm())


def errors(values: Tensor) -> dict[str, float]:
    """The error of the mean of values [N, elements] by how it is computed."""
    world, low = len(values), values.bfloat16()
    divided = low / world
    scaled = (values * (60_000 / values.abs().max())).half()
    half = scaled / world
    return {
        "bf16 ring": error(ring(divided), low),
        "bf16 tree": error(tree(divided), low),
        "fp32": error(ring(low.float() / world), low),
        "fp32, rounded": error(ring(divided.float()).bfloat16(), low),
        "fp16 ring": error(ring(half), scaled),
        "fp16 tree": error(tree(half), scaled),
        "fp16 in fp32, rounded": error(ring(half.float()).half(), scaled),
    }


def gradients_of_a_model(steps: tuple[int, ...], world: int, elements: int) -> dict[str, Tensor]:
    """Some elements [world, elements] of a tiny model's gradients after so many steps of training, one row for each process."""
    device, size, seed = torch.device("cpu"), 4, 7
    with tempfile.TemporaryDirectory() as directory:
        family = open_tiny("sd", Path(directory))
        training = open_training(family, family.load_model(), device, size, learning_rate=1e-3)
    generator, partition = _generator(4), training.partition
    batches = (batch_of(family, random_records(family, size, device, generator), size * n, device) for n in itertools.count())
    shown = torch.randperm(sum(weight.numel() for weight in partition.parameters), generator=_generator(5))[:elements]
    found = {}
    numbers = itertools.count(1)
    for before, until in itertools.pairwise((0, *steps)):
        for number in itertools.islice(numbers, until - before):
            training.train_step(batches, number)
        rows = []
        for batch in itertools.islice(batches, world):
            scale = torch.full((1,), 1 / size)
            _, prediction, gradient = predict_and_compare(
                partition.module, family, batch, training.config, torch.tensor([seed]), scale
            )
            parts = torch.autograd.grad(prediction, partition.parameters, gradient, materialize_grads=True)
            rows.append(torch.cat([part.flatten() for part in parts])[shown])
        found[f"tiny model after {until} steps"] = torch.stack(rows)
    return found


def noise(gradients: Tensor) -> float:
    """The noise of each of gradients [N, elements] in units of their mean, both L2 and as they would be over endless N."""
    variance = gradients.var(0).sum()
    mean = gradients.mean(0).square().sum() - variance / len(gradients)
    return float((variance / mean).sqrt())


def measure(worlds: list[int], elements: int, found: dict[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """A row for each number of processes and kind of gradients, those `found` among them."""
    mean, apart = (torch.randn(count, elements, generator=_generator(count)) for count in (1, max(worlds)))
    rows: list[dict[str, Any]] = []
    for world in worlds:
        for name, structure in STRUCTURES.items():
            rows.append({"processes": world, "gradients": name, **errors(structure(mean, apart[:world]))})
        for name, gradients in (found or {}).items():
            rows.append({"processes": world, "gradients": name, "noise": noise(gradients), **errors(gradients[:world])})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the error by number of processes; of other sums than in bf16 around a ring only that of the worst gradients."""
    worlds = list(dict.fromkeys(row["processes"] for row in rows))
    lines = [f"| sum | gradients | {' | '.join(f'{world:,}' for world in worlds)} |", "|---" * (len(worlds) + 2) + "|"]
    for name in dict.fromkeys(row["gradients"] for row in rows):
        cells = [f"{row['bf16 ring']:.1%}" for row in rows if row["gradients"] == name]
        lines.append(f"| bf16 ring | {name} | {' | '.join(cells)} |")
    for way in [name for name in rows[0] if name not in ("processes", "gradients", "bf16 ring", "noise")]:
        worst = [max(row[way] for row in rows if row["processes"] == world) for world in worlds]
        cells = [f"{value:.2%}" if value > 1e-5 else f"{value:.0e}" for value in worst]
        lines.append(f"| {way} | the worst | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.operations.reduction", description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of a gradient (default: %(default)s)")
    parser.add_argument("--model", action="store_true", help="gradients of a tiny model too (minutes)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    quiet_libraries()
    found = gradients_of_a_model((0, 100), max(WORLDS), options.elements) if options.model else {}
    rows = measure(WORLDS, options.elements, found)
    print(table(rows), *(f"{name}: noise {noise(gradients):.1f}" for name, gradients in found.items()), sep="\n")
    write_result(options.json, __doc__, elements=options.elements, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
