"""Which sample stands where: training is one endless sequence of slots.

Each slot's record is a pure function of (seed, slot). There are two orders:

- Of all records: with n of them, epoch slot // n visits record permutation(seed, epoch)[slot % n] (`engine/permutation.py`).
- By locality, for storage where a record far from the last one costs more: every epoch permutes the shards, and the records of
  each window of so many shards in that order among themselves. Kept are a few numbers per shard, and none per record.

Where there are several streams of records, slots come in units of U that follow each other, and every unit is of one stream
(`Units`); its slots are the next U of the stream's own endless sequence. Kept are a few numbers per stream.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from engine.permutation import permuted
from engine.philox import philox_rounds

_UNITS = 2**32 - 1  # in the place of a stream's number, for the order of the units
_SEEDS = 0x73656564  # the fourth counter word, for seeds

Order = Callable[[Tensor], Tensor]  # from slots [B] to the records that they visit, int64 [B] each


def records_of(seed: int, slots: Tensor, count: int) -> Tensor:
    """The record that each slot [B] visits: int64 [B], in 0 .. count - 1."""
    return permuted(seed, slots // count, slots % count, count)


def order_of(seed: int, records: np.ndarray, window: int | None) -> Order:
    """The order of all records, or that by locality.

    Args:
        records: how many every shard has, int64 [shards].
        window: shards whose records are permuted among themselves; None for all.
    """
    if window is None:
        return functools.partial(records_of, seed, count=int(records.sum()))
    return _Blocks(seed, records, window)


def seed_of_stream(seed: int, stream: int) -> int:
    """The seed of a stream's own permutations; of the first that of the run, so that a single stream needs no other."""
    if stream == 0:
        return seed
    counter = np.array([stream]), 0, np.array([0]), _SEEDS
    low, high, *_ = philox_rounds(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return int(low[0]) | int(high[0]) << 32


class Units:
    """Which stream every unit of slots is of: a pure function of (seed, unit), by shares that are kept to exactly.

    Units come in rounds. With R to a round, and W the sum of the shares, stream s with share w_s has had
    floor(k R w_s / W) units before round k; its units of a round lie among the others' in an order that is permuted by a key
    of the round's own. So a round has R units, or up to S more or less with S streams.

    Args:
        shares: of the streams, exact numbers of any size, not all of them 0.
    """

    def __init__(self, seed: int, shares: Sequence[int | Fraction]) -> None:
        self.seed = seed_of_stream(seed, _UNITS)
        common = math.lcm(*(share.denominator for share in shares))
        # Python's integers: their products do not overflow.
        self.shares = np.array([int(share * common) for share in shares], object)
        self.total = self.shares.sum()
        self.round = max(64, 2 * len(shares))  # more than streams, so that a unit lies in one of two rounds

    def find(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each unit [N], and how many units of that stream come before it: int64 [N] each."""
        rounds = units // self.round
        distinct, where = np.unique(rounds, return_inverse=True)
        rounds += self._before(distinct + 1).sum(1)[where] <= units
        distinct, where = np.unique(rounds, return_inverse=True)
        before = self._before(distinct)
        counts = self._before(distinct + 1) - before
        streams, numbers = self._in_order(distinct, before, counts)
        sizes = counts.sum(1)
        places = (np.cumsum(sizes) - sizes - before.sum(1))[where] + units
        return streams[places], numbers[places]

    def _before(self, rounds: np.ndarray) -> np.ndarray:
        """How many units of each stream come before rounds [K]: int64 [K, S]."""
        return (rounds.astype(object)[:, None] * self.round * self.shares // self.total).astype(np.int64)

    def _in_order(self, rounds: np.ndarray, before: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The streams of all units of rounds [K], one after another, and how many of that stream come before each.

        Args:
            before, counts: of each stream, before each round and in it: [K, S].
        """
        sizes, streams = counts.sum(1), np.tile(np.arange(counts.shape[1]), len(counts))
        of_round = np.repeat(np.arange(len(rounds)), sizes)
        within = np.arange(len(of_round)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        most = self.round + counts.shape[1]  # units of a round
        keys = permuted(self.seed, torch.from_numpy(rounds[of_round]), torch.from_numpy(within), most).numpy()
        drawn = np.repeat(streams, counts.ravel())[np.lexsort((keys, of_round))]
        # Those of each stream and round in their order; they are as many as were counted.
        ranks = np.argsort(of_round * counts.shape[1] + drawn, kind="stable")
        each = counts.ravel()
        numbers = np.empty_like(drawn)
        numbers[ranks] = np.arange(len(drawn)) + np.repeat(before.ravel() - (np.cumsum(each) - each), each)
        return drawn, numbers


class _Blocks:
    """The order by locality."""

    def __init__(self, seed: int, records: np.ndarray, window: int) -> None:
        self.seed, self.records, self.window = seed, records, min(window, len(records))
        self.first_records = np.cumsum(np.append(0, records))
        self._shards_of = functools.lru_cache(2)(self._permute_shards)  # a draw may reach into the next epoch

    def __call__(self, slots: Tensor) -> Tensor:
        count = int(self.first_records[-1])
        epochs, places = (slots // count).numpy(), (slots % count).numpy()
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            found[epochs == epoch] = self._of_epoch(epoch, places[epochs == epoch])
        return torch.from_numpy(found)

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The records at places [B] of an epoch."""
        shards, starts = self._shards_of(epoch)
        windows = (np.searchsorted(starts, places, side="right") - 1) // self.window
        for window in np.unique(windows).tolist():
            here = np.flatnonzero(windows == window)
            start = int(starts[window * self.window])
            end = int(starts[min((window + 1) * self.window, len(shards))])
            places[here] = start + self._permuted(epoch, window + 1, places[here] - start, end - start)
        positions = np.searchsorted(starts, places, side="right") - 1
        return self.first_records[shards[positions]] + places - starts[positions]

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the places in it where each one's records begin; the last one's end too."""
        shards = self._permuted(epoch, 0, np.arange(len(self.records)), len(self.records))
        return shards, np.cumsum(np.append(0, self.records[shards]))

    def _permuted(self, epoch: int, of: int, indices: np.ndarray, count: int) -> np.ndarray:
        """Permutation number `of` of an epoch: 0 of the shards, from 1 on those of the windows."""
        keys = torch.full((len(indices),), (epoch & 0x7FFFFFFF) << 32 | of)
        return permuted(self.seed, keys, torch.from_numpy(indices), count).numpy()


def slots_of_micro_batches(first: int, last: int, micro_batch: int, rank: int, world: int) -> Tensor:
    """The slots of one process in the micro-batches `first` to `last`, exclusive: int64 [last - first, micro_batch].

    Micro-batches are counted from the start of training: number step * accumulation + index. Each is shared by all processes.
    """
    starts = (torch.arange(first, last) * world + rank) * micro_batch
    return starts[:, None] + torch.arange(micro_batch)
