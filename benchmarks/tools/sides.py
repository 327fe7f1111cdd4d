"""Trainings that a question steps by hand: the engine's own, or the recipe's, on batches that are ready, with a lever."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.tools.checkpoints import Checkpoint
from benchmarks.tools.levers import Lever
from benchmarks.tools.plain import PlainTraining
from engine.backends import configure
from engine.data.samples.batch import Batch
from engine.loop import capture
from engine.loop.run import Run
from engine.loop.trainer import Training
from engine.models.family import Family
from engine.processes import Processes
from examples.photographs import photographs

WARM_UP = capture.WARM_UP + 3  # steps: as they are, one to capture, and replays
LEARNING_RATE = 1e-5  # small beside the random weights, so that nothing diverges, and large enough to move each in fp32


def random_records(
    family: Family, size: int, device: torch.device, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Records [size, ...] of a family, with standard deviations above zero."""
    record = {}
    for name, spec in family.encoding.record_spec.items():
        values = torch.randn(size, *spec.shape, generator=generator, device=device)
        record[name] = (values.abs() if name == family.encoding.std else values).to(spec.dtype)
    return record


def batch_of(family: Family, record: dict[str, Tensor], first: int, device: torch.device) -> Batch:
    """Records with the timesteps and coefficients of the slots from `first` on."""
    slots = first + torch.arange(len(next(iter(record.values()))))
    timesteps = family.schedule.draw(torch.tensor([7]), slots, len(slots))
    drawn = slots, timesteps, family.schedule.coefficients(timesteps), torch.zeros(1, dtype=torch.int64)
    return Batch(record, *(tensor.to(device) for tensor in drawn))


def random_batch(family: Family, size: int, device: torch.device) -> Batch:
    """Random records at the first slots."""
    return batch_of(family, random_records(family, size, device), 0, device)


def sample(weights: Iterable[Tensor]) -> Tensor:
    """Some 64 numbers of every weight."""
    return torch.cat([weight.detach().flatten()[:: max(1, weight.numel() // 64)] for weight in weights])


def open_training(family: Family, model: Any, device: torch.device, size: int, steps: int = 10**6, **options: Any) -> Training:
    """The engine's own training of a model, with a moving average, on batches of `size` that the caller has.

    Args:
        options: of the command line, beside those of the family.
    """
    defaults = {"use_ema": True, "train_batch_size": size, "learning_rate": LEARNING_RATE}
    config = family.config.model_copy(update=defaults | options)
    configure(config)
    run = Run(seed=7, global_batch=size, fingerprint="", records=1000, steps=steps)
    return Training(config, run, family, model, Processes(device=device))


class EngineSide:
    """The engine's own training, on one batch again and again."""

    def __init__(self, checkpoint: Checkpoint, lever: Lever, batch: Batch) -> None:
        options = lever.options or {}
        model = checkpoint.load_model(lever.training_form, **options)
        self.training = open_training(checkpoint.family, model, checkpoint.device, len(batch.slots), **options)
        self.numbers = itertools.count(1)
        self.batches = itertools.repeat(batch)
        self.captures = checkpoint.device.type == "cuda" and self.training.config.cuda_graphs != "off"

    def step(self) -> None:
        self.training.train_step(self.batches, next(self.numbers))

    @property
    def weights(self) -> list[Tensor]:
        partition = self.training.partition
        return [partition.view(piece, partition.masters) for piece in partition.slices]

    def graphs(self) -> int:
        """How many graphs its steps replay.

        Raises:
            RuntimeError: steps should be captured and are not, or are and should not.
        """
        graphs = self.training.train_step.graphs
        if bool(graphs) != self.captures:
            raise RuntimeError(f"{graphs} graphs were captured, {'some' if self.captures else 'none'} should be")
        return graphs

    def loss(self) -> float:
        """The mean loss of all steps.

        Raises:
            RuntimeError: a step was skipped, or a loss was not finite.
        """
        metrics, skipped = self.training.metrics, int(self.training.partition.optimizer.norm_and_skips()[1])
        offending = int((metrics.offending >= 0).sum())
        if skipped or offending:
            raise RuntimeError(f"{skipped} steps were skipped, {offending} losses and more were not finite")
        return float(metrics.loss_sum) / metrics.steps


class RecipeSide:
    """The recipe, on one batch again and again; with encoders, on as many photographs, prepared as workers would."""

    def __init__(self, checkpoint: Checkpoint, lever: Lever, batch: Batch) -> None:
        device, encoding = checkpoint.device, checkpoint.family.encoding
        model = checkpoint.load_model(form=None).to(device)
        self.plain = PlainTraining(checkpoint.family, model, device, lever.best, LEARNING_RATE)
        self.batch, self.images = batch, {}
        self.captions: list[str] = []
        if lever.encoders:
            self.encoder = checkpoint.load_encoder()
            pictures = list(photographs().items())
            chosen = [pictures[number % len(pictures)] for number in range(len(batch.slots))]
            distinct = {caption: encoding.prepare(image, 0)[0] for caption, image in pictures[: len(chosen)]}
            self.captions = [caption for caption, _ in chosen]
            prepared = [distinct[caption] for caption in self.captions]
            images = {name: torch.stack([item[name] for item in prepared]) for name in prepared[0]}
            pins = lever.best and device.type == "cuda"
            self.images = {name: tensor.pin_memory() if pins else tensor for name, tensor in images.items()}

    def step(self) -> None:
        record = self.plain.encode(self.encoder, self.images, self.captions) if self.images else self.batch.record
        self.plain.step(record, self.batch.timesteps, self.batch.coefficients)

    @property
    def weights(self) -> list[Tensor]:
        return self.plain.parameters

    def graphs(self) -> int:
        return 0

    def loss(self) -> float:
        return self.plain.loss


def open_side(checkpoint: Checkpoint, lever: Lever, size: int) -> EngineSide | RecipeSide:
    """A training with a lever, ready for its first step; to be opened and stepped within `settings_kept()`."""
    torch.manual_seed(7)
    batch = random_batch(checkpoint.family, size, checkpoint.device)
    side = (RecipeSide if lever.options is None else EngineSide)(checkpoint, lever, batch)
    if lever.cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = lever.cudnn_benchmark
    return side


def check(side: EngineSide | RecipeSide, before: Tensor) -> dict[str, Any]:
    """The loss of a training, and the share of its weights that moved since a sample of them was taken.

    Raises:
        RuntimeError: something is not finite, or the optimizer left the weights alone.
    """
    loss, moved = side.loss(), float((sample(side.weights) != before).float().mean())
    finite = all(bool(weight.isfinite().all()) for weight in side.weights)
    if not math.isfinite(loss) or not finite:
        raise RuntimeError(f"the loss is {loss}, the weights are {'' if finite else 'not '}finite")
    if moved < 0.5:
        raise RuntimeError(f"only {moved:.0%} of the weights moved")
    return {"loss": loss, "moved": moved}
