"""Micro-batches drawn from shards as a training draws them, as fast as they come."""

import contextlib
from collections.abc import Iterator

import torch

from benchmarks.tools.kinds import SEED
from engine.data.format.reader import Shards
from engine.data.samples.batch import Batch, BatchPlan
from engine.data.samples.loader import Loader
from engine.data.samples.order import order_of
from engine.data.samples.streams import Stream, Streams
from engine.diffusion.schedules import DiscreteSchedule

CPU = torch.device("cpu")


@contextlib.contextmanager
def draw(
    shards: Shards, batch: int, steps: range = range(10**9), window: int | None = None, device: torch.device = CPU
) -> Iterator[Iterator[Batch]]:
    """The micro-batches of steps, in the order of all records or in that by locality.

    Args:
        window: shards of the order by locality, None for that of all records.
    """
    schedule = DiscreteSchedule(torch.linspace(0.999, 0.001, 1000), "epsilon")
    streams = Streams(SEED, [Stream(shards, order_of(SEED, shards.index.shards["records"], window))])
    loader = Loader(streams, BatchPlan(batch, 1, 0, 1), SEED, schedule, device, steps.start, steps.stop)
    with contextlib.closing(loader):
        yield iter(loader)
