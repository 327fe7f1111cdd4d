"""Does a step in bf16, captured, learn as one in fp32 without? `python -m benchmarks.steps.curves [--sides NAME...]`

The published sizes with random weights train for `--steps` steps on each of `SIDES`, from the same weights, on the same
records, noise and timesteps, which are functions of the seed: losses differ by the arithmetic alone.

Judged over the last half of the steps, against the first side (fp8: against bf16): the mean difference of the two losses, step
by step, is within noise where it is no larger than two standard errors of the other side's mean loss, which varies with each
step's samples and timesteps. `paired` is the mean difference in its own standard errors: how sure it is that there is one at
all, however small.
"""

import math
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from matplotlib.figure import Figure

from benchmarks.tools.charts import save
from benchmarks.tools.checkpoints import AIMS, opened
from benchmarks.tools.published import TINY
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept
from benchmarks.tools.sides import batch_of, open_training, random_records
from benchmarks.tools.tables import markdown, problem
from engine.data.samples.batch import Batch
from engine.quiet import quiet_libraries

# Side -> precision, and options of the engine.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32, eager": ("no", {"cuda_graphs": "off"}),
    "bf16, captured": ("bf16", {"compile": True}),
    "fp8, captured": ("bf16", {"compile": True, "matrix_precision": "fp8"}),
}
BASES = {"fp8, captured": "bf16, captured"}  # what a side is compared with, where that is not the first of `SIDES`
# Checkpoint -> batch; those of the decoder at 768 px and of 512 px train the same model.
BATCHES = {"SD 1.5, 512 px": 4, "Kandinsky 2.2 prior": 32, "Kandinsky 2.2 decoder, 512 px": 4, "Wuerstchen v2 prior, 768 px": 4}
RECORDS = 8  # batches of records, seen again and again
LEARNING_RATE = 1e-4
WINDOW = 10  # steps of the running mean in the picture
EXPECTED_SECONDS = {False: 150, True: 200}  # of a side, uncompiled in fp32 or compiled from cold caches; assumed


def batches(family: Any, size: int, device: torch.device) -> Iterator[Batch]:
    """Batches of the endless sequence of slots over a few random records."""
    generator = torch.Generator(device).manual_seed(7)
    records = [random_records(family, size, device, generator) for _ in range(RECORDS)]
    for number in count():
        yield batch_of(family, records[number % RECORDS], number * size, device)


def losses(name: str, side: str, steps: int, size: int, device: torch.device) -> dict[str, Any]:
    """The loss of every step of a checkpoint, or tiny family, on one side."""
    precision, options = SIDES[side]
    precision = precision if device.type == "cuda" else "no"
    with opened(name, device, mixed_precision=precision) as checkpoint, settings_kept():
        torch.backends.cudnn.allow_tf32 = False  # torch's default would round what fp32 convolutions multiply to 10 bits
        torch.manual_seed(7)
        family = checkpoint.family
        sequence = batches(family, size, device)
        model = checkpoint.load_model(**options)
        training = open_training(family, model, device, size, learning_rate=LEARNING_RATE, use_ema=False, **options)
        seen = []
        for number in range(1, steps + 1):
            training.train_step(sequence, number)
            seen.append(training.metrics.loss_sum.clone())
            training.metrics.loss_sum.zero_()
        torch._dynamo.reset()
        return {"losses": torch.stack(seen).tolist()}


def judge(base: list[float], other: list[float]) -> dict[str, Any]:
    """Whether the losses of two sides differ by more than noise, over the last half of the steps (as above)."""
    half = len(base) // 2
    base, other = base[half:], other[half:]
    if not all(map(math.isfinite, [*base, *other])):
        return {"failed": "a loss is not finite"}
    differences = [b - a for a, b in zip(base, other, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(base) / math.sqrt(len(base))
    paired = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "base_loss": statistics.mean(base), "loss": statistics.mean(other), "difference": mean,
        "two_standard_errors": 2 * error,
        "within_noise": abs(mean) <= 2 * error, "paired": mean / paired if paired else 0.0,
    }  # fmt: skip


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every side of every checkpoint against the first that was measured on the same device, or as `BASES` says."""
    place = {side: number for number, side in enumerate(SIDES)}
    result = []
    rows = sorted(rows, key=lambda row: place.get(row["side"], len(place)))
    for row in rows:
        about = [row.get(key) for key in ("checkpoint", "device", "batch")]
        alike = [r for r in rows if [r.get(key) for key in ("checkpoint", "device", "batch")] == about and not problem(r)]
        base = next((r for r in alike if r["side"] == BASES.get(row["side"])), alike[0] if alike else row)
        names = {key: row.get(key) for key in ("checkpoint", "side", "batch")} | {"base": base["side"]}
        if problem(row):
            result.append(names | {"failed": problem(row)})
        elif base is not row:
            result.append(names | judge(base["losses"], row["losses"]))
    return result


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(verdicts(rows), {
        "model": "checkpoint", "side": "side", "batch": "batch", "against": "base", "loss": "loss", "its loss": "base_loss",
        "difference": "difference", "two standard errors": "two_standard_errors", "within noise": "within_noise",
        "paired": "paired",
    })  # fmt: skip


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves of every checkpoint in a panel, each as a running mean over `WINDOW` steps."""
    measured = [row for row in rows if not problem(row)]
    names = list(dict.fromkeys(row["checkpoint"] for row in measured))
    height = max(-(-len(names) // 2), 1)
    figure = Figure(figsize=(11, 3.2 * height), layout="constrained")
    panels = figure.subplots(height, 2, squeeze=False).flat
    for panel, name in zip(panels, names, strict=False):
        for row in (row for row in measured if row["checkpoint"] == name):
            values = row["losses"]
            means = [statistics.mean(values[max(0, step - WINDOW + 1) : step + 1]) for step in range(len(values))]
            panel.plot(range(1, len(values) + 1), means, linewidth=1, label=f"{row['side']}, batch {row.get('batch')}")
        panel.set(title=name, xlabel="step", ylabel="loss")
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead of the published size")
    parser.add_argument("--checkpoints", nargs="+", choices=[*AIMS, *TINY], help="default: all but the decoder at 768 px")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES)[:2], help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="instead of each checkpoint's own")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    for name in options.checkpoints or (list(TINY) if options.tiny else list(BATCHES)):
        for side in options.sides:
            seconds = 5 if name in TINY else EXPECTED_SECONDS["compile" in SIDES[side][1]]
            batch = options.batch or BATCHES.get(name, 4)
            work = partial(losses, name, side, options.steps, batch, device)
            rows.append(kept.measure(f"{name}: {side}, batch {batch}", seconds, work, checkpoint=name, side=side, batch=batch))
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
