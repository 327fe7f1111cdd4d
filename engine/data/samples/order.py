"""Which sample stands where: training is one endless sequence of slots.

Each slot's record is a pure function of (seed, slot). There are two orders:

- Of all records: with n of them, epoch slot // n visits record permutation(seed, epoch)[slot % n] (`engine/permutation.py`).
- By locality, for storage where a record far from the last one costs more: every epoch permutes the shards, and the records of
  each window of so many shards in that order among themselves. Kept are a few numbers per shard, and none per record.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.permutation import permuted

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
