"""Families open for training: at their published size with random weights, or with a few thousand weights on a CPU."""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.cost import Cost, count
from benchmarks.tools.published import TINY, open_random, open_tiny, trained_model

# Checkpoint -> the batch that its waterfall aims at, and further ones of the sweep.
AIMS = {
    "SD 1.5, 512 px": (32, [8, 16, 64]),
    "Kandinsky 2.2 prior": (128, [32, 256]),
    "Kandinsky 2.2 decoder, 512 px": (32, [8, 64]),
    "Kandinsky 2.2 decoder, 768 px": (16, [4, 32]),
    "Wuerstchen v2 prior, 768 px": (32, [8, 64]),
}
TINY_AIM = (4, [2])
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


@contextlib.contextmanager
def opened(name: str, device: torch.device, **options: Any) -> Iterator[tuple[Any, Cost, int]]:
    """The family of a checkpoint at its published size with random weights, or a tiny one; its cost; its waterfall's batch.

    Args:
        options: of the training; its precision is that of the device, unless they say otherwise.
    """
    tiny = name in TINY
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
    with tempfile.TemporaryDirectory() as directory, compiling_cheaply() if tiny else contextlib.nullcontext():
        options = {"mixed_precision": PRECISION[device.type], "output_dir": directory, **options}
        family: Any = (
            open_tiny(name, Path(directory), **options) if tiny else open_random(name, Path(directory), device, **options)
        )
        with torch.device("cpu" if tiny else "meta"):
            cost = count(family, family.load_model(form=None) if tiny else trained_model(name))
        yield family, cost, largest_batch(AIMS.get(name, TINY_AIM)[0], cost, memory)
