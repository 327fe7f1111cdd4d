"""Which records are held out of training: a keyed choice in every shard, that no seed of a run moves.

A shard's choice is a function of the number of its first sample, of how many records it has, and of the fraction. So a data set
that grows, by further shards, keeps held out what was, in any run, and shards that were built before need nothing new; a shard
that loses a sample chooses anew. The records of a shard are divided into as many blocks of even size as it holds records out,
and each block gives one: no order that the data set has in itself (classes in turn, frames of a film) decides which. Kept are
a few numbers per shard, and none per record.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.data.format.index import Index
from engine.data.samples.order import Order
from engine.permutation import permuted
from engine.philox import philox_rounds

KEY = 0x68656C64  # of every choice
# The fourth counter word: how many a shard holds out, and which of a block.
_COUNT, _PLACE = 0x636F756E, 0x706C6163


class Split:
    """The records of some shards, divided into those that are trained on and those that are held out.

    trained, held: how many every shard has of each, int64 [shards].

    Args:
        records: how many every shard has in all, int64 [shards].
        first_samples: the number of each shard's first sample, int64 [shards].
        fraction: of the records to be held out, above 0 and below 1: exactly as many in the mean, but not all of the first
            shard.
        some: hold out one at least: of the first shard that has two.
    """

    def __init__(self, records: np.ndarray, first_samples: np.ndarray, fraction: float, some: bool = True) -> None:
        self.first_samples = first_samples
        words = _words(np.zeros_like(first_samples), first_samples, _COUNT)
        self.held = np.minimum((round(fraction * 2**32) * records + words) >> 32, records)
        # Nothing behind a shard decides what it holds out, so that growth does not.
        first, several = (np.flatnonzero(records > least)[:1] for least in (0, 1))
        self.held[first] = np.minimum(self.held[first], records[first] - 1)
        if some:
            self.held[several] = np.maximum(self.held[several], 1)
        self.trained = records - self.held
        self._first_records, self._first_trained, self._first_held = (
            np.cumsum(np.append(0, counts)) for counts in (records, self.trained, self.held)
        )

    def trained_records(self, numbers: Tensor) -> Tensor:
        """The records of numbers [B] among those that are trained on: int64 [B]."""
        shards, within = _found(self._first_trained, numbers.numpy())
        held, trained = self.held[shards], self.trained[shards]
        # A block is short of one record, the held one: block k begins with number k * trained // held.
        blocks = np.where(held > 0, -(-(within + 1) * held // trained) - 1, 0)
        before = blocks * trained // np.maximum(held, 1)
        places = within - before
        starts, chosen = self._block(shards, np.minimum(blocks, held - 1))
        places += (held > 0) & (places >= chosen)
        return torch.from_numpy(self._first_records[shards] + starts + places)

    def held_records(self, numbers: Tensor) -> Tensor:
        """The records of numbers [B] among those that are held out: int64 [B]."""
        shards, blocks = _found(self._first_held, numbers.numpy())
        starts, chosen = self._block(shards, blocks)
        return torch.from_numpy(self._first_records[shards] + starts + chosen)

    def without_held(self, order: Order) -> Order:
        """The order of records, from one of the numbers of those that are trained on."""
        return lambda slots: self.trained_records(order(slots))

    def _block(self, shards: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where blocks [B] of shards begin, and which place within them is held out; 0 in a shard that holds none out."""
        held = np.maximum(self.held[shards], 1)
        records = self.held[shards] + self.trained[shards]
        some = self.held[shards] > 0
        starts = blocks * records // held
        sizes = (blocks + 1) * records // held - starts
        chosen = _words(blocks, self.first_samples[shards], _PLACE) * sizes >> 32
        return np.where(some, starts, 0), np.where(some, chosen, 0)


def splits_of(indexes: Iterable[Index], fraction: float | None) -> list[Split | None]:
    """What is held out of each of several directories of shards, of one at least; None where nothing is to be."""
    if not fraction:
        return [None for _ in indexes]
    splits: list[Split | None] = []
    some = True
    for index in indexes:
        split = Split(index.shards["records"], index.shards["first_sample"], fraction, some)
        some = some and not split.held.any()
        splits.append(split)
    return splits


def chosen(counts: Sequence[int], most: int) -> list[Tensor]:
    """Which of the numbers below each count are taken, over all `most` at most: int64 [N] each, increasing, always the same."""
    total = sum(counts)
    if most >= total:
        return [torch.arange(count) for count in counts]
    places = torch.arange(most)
    numbers = permuted(KEY, torch.zeros_like(places), places, total).sort().values
    ends = torch.tensor(counts).cumsum(0)
    parts = torch.tensor_split(numbers, torch.searchsorted(numbers, ends[:-1]))
    return [part - (end - count) for part, end, count in zip(parts, ends, counts, strict=True)]


def _found(firsts: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In which shard numbers [B] lie, and where in it."""
    shards = np.searchsorted(firsts, numbers, side="right") - 1
    return shards, numbers - firsts[shards]


def _words(places: np.ndarray, first_samples: np.ndarray, stream: int) -> np.ndarray:
    """32 random bits each, for the same places of the same shards always the same: int64 [B]."""
    low, high = first_samples & 0xFFFFFFFF, first_samples >> 32
    return philox_rounds((places & 0xFFFFFFFF, low, high, np.full_like(low, stream)), (KEY, 0))[0]
