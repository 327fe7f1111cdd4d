"""How much less does the gradient vary with stratified timesteps? `python -m benchmarks.steps.stratified [--draws N]`

Gradients of one batch after another are taken at the same weights, those of a tiny Stable Diffusion that was trained for a
while, on the same records and noise: once with timesteps that are uniform and independent, and once with one from each of as
many equal parts of the schedule as the batch has samples. The variance is that of the whole gradient, summed over weights; its
ratio has an error from ten groups of draws. Only what varies with the timestep can become less: records and noise vary on.
"""

import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.tools.charts import BLUE, GREY, save
from benchmarks.tools.checkpoints import opened
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept
from benchmarks.tools.sides import batch_of, open_training, random_records
from benchmarks.tools.tables import markdown, problem
from engine.loop.step import predict_and_compare
from engine.models.family import Family, open_family
from engine.quiet import quiet_libraries

BATCHES = (4, 16, 64)
# How losses are weighed -> options of the command line.
WEIGHTINGS: dict[str, dict[str, Any]] = {
    "none": {}, "Min-SNR": {"snr_gamma": 5.0}, "debiased": {"loss_weighting": "debiased"}, "EDM": {"loss_weighting": "edm"},
}  # fmt: skip
SIDES = ("uniform", "stratified")
DRAWS, GROUPS = 150, 10
TRAINED, RATE, RECORDS = 40, 2e-3, 256  # steps before the weights are held, how fast, and records that batches are of
EXPECTED_SECONDS = 60


def measure(batch: int, weighting: str, draws: int, trained: int, device: torch.device) -> dict[str, Any]:
    """The variances of gradient and loss on both sides, and the ratio of those of the gradient with its standard error."""
    with settings_kept(), opened("sd", device, **WEIGHTINGS[weighting]) as checkpoint:
        torch.manual_seed(7)
        config = checkpoint.family.config
        families = [open_family(config.model_copy(update={"timestep_sampling": side})) for side in SIDES]
        records = random_records(checkpoint.family, RECORDS, device, torch.Generator(device).manual_seed(7))
        training = open_training(families[1], checkpoint.load_model(), device, 16, learning_rate=RATE)
        sequence = (batch_of(families[1], some(records, 16, number), 16 * number, device) for number in range(trained))
        for number in range(1, trained + 1):
            training.train_step(sequence, number)
        sides = [gradients(family, training.partition, records, batch, draws) for family in families]
    variances = [[variance(group) for group in part.chunk(GROUPS)] for part, _ in sides]
    uniform, stratified = (variance(part) for part, _ in sides)
    ratios = [after / before for before, after in zip(*variances, strict=True)]
    return {
        "uniform": uniform, "stratified": stratified, "ratio": stratified / uniform,
        "error": statistics.stdev(ratios) / math.sqrt(GROUPS),
        "loss_ratio": float(sides[1][1].var() / sides[0][1].var()),
    }  # fmt: skip


def some(records: dict[str, Tensor], batch: int, number: int) -> dict[str, Tensor]:
    """Records drawn for batch `number`."""
    generator = torch.Generator().manual_seed(number)
    chosen = torch.randint(RECORDS, (batch,), generator=generator)
    return {name: tensor[chosen.to(tensor.device)] for name, tensor in records.items()}


def gradients(family: Family, partition: Any, records: dict[str, Tensor], batch: int, draws: int) -> tuple[Tensor, Tensor]:
    """Of every draw the gradient of the mean loss, [draws, weights], and that loss, [draws], at the weights as they are."""
    device = partition.processes.device
    scale, seed = torch.full((1,), 1 / batch, device=device), torch.tensor([7], device=device)
    found, losses = [], []
    for number in range(draws):
        # Beyond the slots that were trained on.
        given = batch_of(family, some(records, batch, 10**6 + number), 10**6 * batch + number * batch, device)
        loss, prediction, gradient = predict_and_compare(partition.module, family, given, family.config, seed, scale)
        parts = torch.autograd.grad(prediction, partition.parameters, gradient)
        found.append(torch.cat([part.flatten() for part in parts]).cpu())
        losses.append(loss.mean().cpu())
    return torch.stack(found), torch.stack(losses)


def variance(gradients: Tensor) -> float:
    """Summed over the weights."""
    return float(gradients.double().var(dim=0).sum())


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {
        "weights of the loss": "weighting", "batch": "batch", "uniform": "uniform", "stratified": "stratified",
        "ratio": "ratio", "error": "error", "of the loss": "loss_ratio",
    })  # fmt: skip


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """The ratio of the variances by batch, a panel for each weighting."""
    measured = [row for row in rows if not problem(row)]
    weightings = list(dict.fromkeys(row["weighting"] for row in measured))
    figure = Figure(figsize=(11, 3), layout="constrained")
    for panel, weighting in zip(figure.subplots(1, len(weightings), sharey=True, squeeze=False)[0], weightings, strict=True):
        shown = [row for row in measured if row["weighting"] == weighting]
        places = [str(row["batch"]) for row in shown]
        panel.bar(places, [row["ratio"] for row in shown], yerr=[row["error"] for row in shown], color=BLUE)
        panel.axhline(1, color=GREY, linewidth=1)
        panel.set(title=f"weights: {weighting}", xlabel="batch", ylim=(0, 1.2))
        panel.spines[["top", "right"]].set_visible(False)
    figure.supylabel("variance, stratified / uniform", fontsize=9)
    save(figure, path)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help="batches of each side (default: %(default)s)")
    parser.add_argument("--trained", type=int, default=TRAINED, help="steps before (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="where to draw the ratios, as a PNG")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    for weighting in WEIGHTINGS:
        for batch in options.batches:
            work = partial(measure, batch, weighting, options.draws, options.trained, device)
            about = {"weighting": weighting, "batch": batch, "draws": options.draws}
            rows.append(kept.measure(f"{weighting}, {batch}", EXPECTED_SECONDS, work, **about))
    if options.picture:
        chart(rows, options.picture)
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
