"""Micro-batches drawn from shards as a training draws them, as fast as they come."""

import contextlib
from collections.abc import Iterator

import torch

from benchmarks.tools.kinds import SEED
from engine.data.format.reader import Shards
from engine.data.samples.batch import Batch, BatchPlan
from engine.data.samples.dropout import Dropout
from engine.data.samples.loader import Loader
from engine.data.samples.order import order_of, seed_of_stream
from engine.data.samples.streams import Stream, Streams
from engine.diffusion.schedules import DiscreteSchedule

CPU = torch.device("cpu")


@contextlib.contextmanager
def draw(
    shards: Shards,
    batch: int,
    steps: range = range(10**9),
    window: int | None = None,
    device: torch.device = CPU,
    streams: int = 1,
    dropped: float = 0.0,
) -> Iterator[Iterator[Batch]]:
    """The micro-batches of steps, in the order of all records or in that by locality.

    Args:
        window: shards of the order by locality, None for that of all records.
        streams: as many readers of the same shards, whose shares go from 1 to as many.
        dropped: the proportion of samples whose rows, all of them, are replaced.
    """
    schedule = DiscreteSchedule(torch.linspace(0.999, 0.001, 1000), "epsilon")
    readers = [shards, *(Shards(shards.directory, readers=streams) for _ in range(streams - 1))]
    orders = [order_of(seed_of_stream(SEED, number), shards.index.shards["records"], window) for number in range(len(readers))]
    found = [Stream(reader, order, number) for number, (reader, order) in enumerate(zip(readers, orders, strict=True), 1)]
    dropout = Dropout(dropped, {name: torch.zeros(field.shape, dtype=field.dtype) for name, field in shards.fields.items()})
    loader = Loader(
        Streams(SEED, found, batch), BatchPlan(batch, 1, 0, 1), SEED, schedule, device, steps.start, steps.stop,
        dropout=dropout if dropped else None,
    )  # fmt: skip
    with contextlib.closing(loader):
        yield iter(loader)
