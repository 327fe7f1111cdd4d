"""Do weights without fp32 masters follow those that have them? `python -m benchmarks.steps.masters [--steps N]`

A tiny Stable Diffusion is trained in bf16 three times, from the same weights, on the same records and noise: with fp32 masters;
without, the weights and moments rounded stochastically (`--masters none`); and without, rounded to the nearest, as bf16 is
anywhere else. Compared are the loss over records that are not trained on, and how much of the way that those with masters have
gone from the start the others have gone in the same direction. Predicted: a step of the learning rate is less than half of the
last bf16 digit of most weights, so that those rounded to the nearest hardly move, and their second moments neither.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.tools.charts import BLUE, GREY, RED, save
from benchmarks.tools.checkpoints import opened
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept
from benchmarks.tools.sides import batch_of, open_training, random_records
from benchmarks.tools.tables import markdown, problem
from engine.kernels.adamw_ema import reference_adamw_ema_, reference_lion_ema_
from engine.loop.step import predict_and_compare
from engine.loop.trainer import Training
from engine.models.family import Family
from engine.quiet import quiet_libraries

SIDES = {"fp32 masters": BLUE, "bf16, stochastic": RED, "bf16, nearest": GREY}
OPTIMIZERS = {"adamw": 1e-4, "lion": 3e-5}  # with their learning rates
STEPS, MARKS, SIZE, RECORDS = 300, 20, 8, 64  # steps in all, and between looks; samples of a batch; records that they are of
EXPECTED_SECONDS = 300


def measure(optimizer: str, steps: int, device: torch.device) -> dict[str, Any]:
    """At every mark the loss of each side, and how much of the way its weights have gone."""
    with settings_kept(), opened("sd", device, mixed_precision="bf16") as checkpoint:
        family = checkpoint.family
        records = random_records(family, RECORDS, device, torch.Generator(device).manual_seed(7))
        held_out = batch_of(family, some(random_records(family, SIZE, device), 0), 10**6, device)
        trainings = {side: opened_side(family, checkpoint.load_model(), side, optimizer, device) for side in SIDES}
        start = {side: weights_of(training) for side, training in trainings.items()}["fp32 masters"]
        found: dict[str, dict[str, list[float]]] = {side: {"loss": [], "way": []} for side in SIDES}
        marks = []
        for number in range(steps + 1):
            if number % MARKS == 0:
                marks.append(number)
                look(trainings, held_out, start, found)
            for training in trainings.values() if number < steps else ():
                training.train_step(iter([batch_of(family, some(records, number), SIZE * number, device)]), number + 1)
    last = {side: {name: values[-1] for name, values in of.items()} for side, of in found.items()}
    flat = {f"{side}: {name}": value for side, of in last.items() for name, value in of.items()}
    return {
        "rate": OPTIMIZERS[optimizer],
        "start_loss": found["fp32 masters"]["loss"][0],
        **flat,
        "marks": marks,
        "curves": found,
    }


def opened_side(family: Family, model: Any, side: str, optimizer: str, device: torch.device) -> Training:
    masters = "fp32" if side == "fp32 masters" else "none"
    options: dict[str, Any] = {"optimizer": optimizer, "masters": masters, "learning_rate": OPTIMIZERS[optimizer]}
    training = open_training(family, model, device, SIZE, use_ema=False, seed=7, adam_weight_decay=0.0, **options)
    if side == "bf16, nearest":
        stepped: Any = training.partition.optimizer
        step: Any = reference_adamw_ema_ if optimizer == "adamw" else reference_lion_ema_

        def take(group: dict[str, Any], tensors: tuple[Any, ...], rounding: Tensor | None) -> None:
            epsilon = (group["eps"],) if optimizer == "adamw" else ()
            step(*tensors, *group["betas"], *epsilon, group["weight_decay"], None)

        stepped.take = take
    return training


def some(records: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """The records of a batch, the same for all sides."""
    first = SIZE * number % len(next(iter(records.values())))
    return {name: values[first : first + SIZE] for name, values in records.items()}


def weights_of(training: Training) -> Tensor:
    partition = training.partition
    return torch.cat([partition.view(piece, partition.masters).float() for piece in partition.slices])


@torch.no_grad()
def look(trainings: dict[str, Training], batch: Any, start: Tensor, found: dict[str, dict[str, list[float]]]) -> None:
    weights = {side: weights_of(training) for side, training in trainings.items()}
    followed = weights["fp32 masters"]
    way = followed - start
    for side, training in trainings.items():
        step = training.train_step
        losses, *_ = predict_and_compare(
            training.partition.module, training.family, batch, training.config, step.seed, step.gradient_scale
        )
        found[side]["loss"].append(float(losses.mean()))
        found[side]["way"].append(float((weights[side] - start) @ way / (way @ way)) if way.any() else 1.0)


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {
        "optimizer": "optimizer", "learning rate": "rate", "loss before": "start_loss",
        **{f"{side}: {name}": f"{side}: {name}" for side in SIDES for name in ("loss", "way")},
    })  # fmt: skip


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and way by step, a column for each optimizer."""
    measured = [row for row in rows if not problem(row)]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(2, len(measured), sharex=True, squeeze=False)
    for column, row in enumerate(measured):
        for name, panel in zip(("loss", "way"), panels[:, column], strict=True):
            for side, color in SIDES.items():
                panel.plot(
                    row["marks"], row["curves"][side][name], color=color, label=side, linewidth=5 if color == BLUE else 1.5
                )
            panel.spines[["top", "right"]].set_visible(False)
        panels[0, column].set(title=f"{row['optimizer']}, learning rate {row['rate']:g}")
        panels[1, column].set(xlabel="step")
    panels[0, 0].set(ylabel="held-out loss")
    panels[1, 0].set(ylabel="of the way with masters")
    panels[0, 0].legend(frameon=False)
    save(figure, path)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="where to draw the curves, as a PNG")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    for optimizer in OPTIMIZERS:
        work = partial(measure, optimizer, options.steps, device)
        rows.append(kept.measure(optimizer, EXPECTED_SECONDS, work, optimizer=optimizer, steps=options.steps))
    if options.picture:
        chart(rows, options.picture)
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
