"""Which sample stands where: training is one endless sequence of slots.

Each slot's record is a pure function of (seed, slot).

With n records, epoch slot // n visits record permutation(seed, epoch)[slot % n]. The permutation is a keyed bijection that is
evaluated per index in O(1) memory: a balanced Feistel network over the smallest even number of bits that holds n, with Philox
as its round function, and cycle walking for the indices beyond n (Black and Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002).
"""

import numpy as np
import torch
from torch import Tensor

from engine.kernels.philox import philox_rounds

ROUNDS = 6
# The fourth counter word, far from the streams of philox.py so that no other draw shares a counter.
_STREAM = 0x6F726465


def permuted(seed: int, epochs: Tensor, indices: Tensor, count: int) -> Tensor:
    """permutation(seed, epoch)[index] for int64 tensors `epochs` and `indices` [B], 0 <= index < count: int64 [B].

    A call costs hundreds of array operations whatever B: make few, for many indices.
    """
    half_bits = max(1, -(-(count - 1).bit_length() // 2))
    # numpy: on small arrays its operations cost a third of torch's.
    epoch_of = epochs.numpy()
    values = _feistel(seed, epoch_of, indices.numpy(), half_bits)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        values[outside] = _feistel(seed, epoch_of[outside], values[outside], half_bits)
        outside = outside[values[outside] >= count]
    return torch.from_numpy(values)


def _feistel(seed: int, epochs: np.ndarray, values: np.ndarray, half_bits: int) -> np.ndarray:
    mask = (1 << half_bits) - 1
    left, right = values >> half_bits, values & mask
    low, high = epochs & 0xFFFFFFFF, epochs >> 32
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for round_number in range(ROUNDS):
        # The key takes the seed, and the counter takes the epoch, the round and the half that is mixed.
        word = philox_rounds((right, low, high, _STREAM + round_number), key)[0]
        left, right = right, left ^ (word & mask)
    return (left << half_bits) | right


def records_of(seed: int, slots: Tensor, count: int) -> Tensor:
    """The record that each slot [B] visits: int64 [B], in 0 .. count - 1."""
    return permuted(seed, slots // count, slots % count, count)


def slots_of_micro_batches(first: int, last: int, micro_batch: int, rank: int, world: int) -> Tensor:
    """The slots of one process in the micro-batches `first` to `last`, exclusive: int64 [last - first, micro_batch].

    Micro-batches are counted from the start of training: number step * accumulation + index. Each is shared by all processes.
    """
    starts = (torch.arange(first, last) * world + rank) * micro_batch
    return starts[:, None] + torch.arange(micro_batch)
