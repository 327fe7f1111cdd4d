"""Checkpoints open for training: at their published size with random weights, or with a few thousand weights."""

import contextlib
import copy
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.cost import Cost, count
from benchmarks.tools.published import TINY, open_tiny, random_encoder, trained_model, write
from engine.models.encoder import Encoder
from engine.models.family import Family, open_family
from engine.models.training_form import SHIPPED, Form

# Checkpoint -> the batch that its waterfall aims at.
AIMS = {
    "SD 1.5, 512 px": 32,
    "Kandinsky 2.2 prior": 128,
    "Wuerstchen v2 prior, 768 px": 32,
    "Kandinsky 2.2 decoder, 768 px": 16,
    "Kandinsky 2.2 decoder, 512 px": 32,
}
TINY_AIM = 4
PRECISION = {"cuda": "bf16", "cpu": "no"}


def largest_batch(aim: int, cost: Cost, memory: float) -> int:
    """The largest power of two, up to `aim`, with which the recipe should fit a card's memory in bytes.

    Per parameter it keeps 4 bytes each for the weight, the gradient, two moments, the average and the temporaries of
    `foreach`, and 2 for autocast's copy. Per sample autograd keeps, by count of its saved tensors in bf16, 0.6 to 1.2 times
    what matrix products, convolutions and attention read and write in a forward pass; 1.3 leaves room for the norms, which
    autocast runs in fp32. A tenth of the card is for the allocator, the context and libraries' workspaces.
    """
    free = 0.9 * memory - 26 * cost.parameters
    batch = aim
    while batch > 1 and batch * 1.3 * cost.sample_bytes / 3 > free:
        batch //= 2
    return batch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint at its published size with random weights, or one of a few thousand weights, open for training.

    name: of the published checkpoint, or of the tiny one's family.
    family: what its configurations say; its models come from here.
    """

    name: str
    family: Family
    device: torch.device

    @property
    def tiny(self) -> bool:
        return self.name in TINY

    def load_model(self, form: Form | None = SHIPPED, **options: Any) -> Any:
        """What is trained, as `Family.load_model` gives it; at full size on the device.

        Args:
            options: of the command line, beside those of the family, where they shape the model.
        """
        if self.tiny:
            model = self.family.published_model()
        else:
            with self.device:
                model = trained_model(self.name)
        if form is not None:
            family = copy.copy(self.family)
            family.config = family.config.model_copy(update=options)
            family.ready_to_train(model, form)
        return model.train()

    def load_encoder(self) -> Encoder:
        """The frozen models, on the device."""
        encoding = self.family.encoding
        return encoding.load_encoder(self.device) if self.tiny else random_encoder(self.name, encoding, self.device)

    @cached_property
    def cost(self) -> Cost:
        with torch.device("cpu" if self.tiny else "meta"):
            return count(self.family, self.load_model(form=None) if self.tiny else trained_model(self.name))

    @property
    def batch(self) -> int:
        """The batch of its waterfall."""
        memory = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else math.inf
        return largest_batch(AIMS.get(self.name, TINY_AIM), self.cost, memory)


def open_checkpoint(name: str, directory: Path, device: torch.device, **options: Any) -> Checkpoint:
    """Opens a published checkpoint or a tiny family, whose files then lie under `directory`.

    Args:
        options: of the training; its precision is that of the device, unless they say otherwise.
    """
    options = {"mixed_precision": PRECISION[device.type], "output_dir": str(directory / "out"), **options}
    family = open_tiny(name, directory, **options) if name in TINY else open_family(write(name, directory, **options))
    return Checkpoint(name, family, device)


@contextlib.contextmanager
def opened(name: str, device: torch.device, **options: Any) -> Iterator[Checkpoint]:
    """As `open_checkpoint`, in a temporary directory; tiny models are compiled cheaply."""
    with tempfile.TemporaryDirectory() as directory, compiling_cheaply() if name in TINY else contextlib.nullcontext():
        yield open_checkpoint(name, Path(directory), device, **options)
