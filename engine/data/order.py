"""Which sample stands where: training is one endless sequence of slots.

Each slot's record is a pure function of (seed, slot).

With n records, epoch slot // n visits record permutation(seed, epoch)[slot % n]. The permutation is a keyed bijection that is
evaluated per index in O(1) memory: a balanced Feistel network over the smallest even number of bits that holds n, with Philox
as its round function, and cycle walking for the indices beyond n (Black and Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002).
"""

import torch
from torch import Tensor

from engine.kernels.philox import philox_words

ROUNDS = 6
# The fourth counter word, far from the streams of philox.py so that no other draw shares a counter.
_STREAM = 0x6F726465


def permuted(seed: int, epochs: Tensor, indices: Tensor, count: int) -> Tensor:
    """permutation(seed, epoch)[index] for int64 tensors `epochs` and `indices` (0 <= index < count) of one shape."""
    half_bits = max(1, -(-(count - 1).bit_length() // 2))
    values = _feistel(seed, epochs, indices, half_bits)
    while bool((outside := values >= count).any()):
        values = torch.where(outside, _feistel(seed, epochs, values, half_bits), values)
    return values


def _feistel(seed: int, epochs: Tensor, values: Tensor, half_bits: int) -> Tensor:
    mask = (1 << half_bits) - 1
    left, right = values >> half_bits, values & mask
    low, high = epochs & 0xFFFFFFFF, epochs >> 32
    for round_number in range(ROUNDS):
        # The key takes the seed, and the counter takes the epoch, the round and the half that is mixed.
        key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor((seed >> 32) & 0xFFFFFFFF)
        word = philox_words((right, low, high, torch.full_like(right, _STREAM + round_number)), key)[..., 0]
        left, right = right, left ^ (word & mask)
    return (left << half_bits) | right


def records_of(seed: int, slots: Tensor, count: int) -> Tensor:
    """The record that each slot visits: int64 of the shape of `slots`, in 0 .. count - 1."""
    return permuted(seed, slots // count, slots % count, count)


def slots_of_micro_batch(
    step: int, global_batch: int, micro_batch: int, accumulation_index: int, rank: int, world: int
) -> Tensor:
    """The slots of one process in one micro-batch of optimizer step `step` (counted from 0): int64 [micro_batch]."""
    first = step * global_batch + (accumulation_index * world + rank) * micro_batch
    return torch.arange(first, first + micro_batch)
