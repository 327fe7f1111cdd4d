"""A keyed permutation, evaluated per index in constant memory: a pure function of (seed, key, index).

A balanced Feistel network over the smallest even number of bits that holds `count`, with Philox as its round function, and
cycle walking for the indices beyond it (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

import ctypes

import numpy as np
import torch
from torch import Tensor

import cpp_ext
from engine.philox import philox_rounds

ROUNDS = 6
# The fourth counter word, far from the streams of philox.py so that no other draw shares a counter.
_STREAM = 0x6F726465


def permuted(seed: int, epochs: Tensor, indices: Tensor, count: int) -> Tensor:
    """permutation(seed, epoch)[index] for int64 tensors `epochs` and `indices` [B], 0 <= index < count: int64 [B]."""
    permute = permuted_in_numpy if cpp_ext.load("order") is None else permuted_in_cpp
    half_bits = max(1, -(-(count - 1).bit_length() // 2))
    return torch.from_numpy(permute(seed, epochs.contiguous().numpy(), indices.contiguous().numpy(), count, half_bits))


def permuted_in_cpp(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int, half_bits: int) -> np.ndarray:
    """A microsecond per index at most, without Python's lock."""
    library = cpp_ext.load("order")
    assert library is not None
    records = np.empty_like(indices)
    library.permute(
        ctypes.c_uint64(seed & (1 << 64) - 1), *(array.ctypes.data_as(ctypes.c_void_p) for array in (epochs, indices)),
        ctypes.c_int64(len(indices)), ctypes.c_int64(count), ctypes.c_int32(half_bits),
        records.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    return records


def permuted_in_numpy(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int, half_bits: int) -> np.ndarray:
    """Milliseconds per call, whatever the number of indices: to be called for many."""
    values = _feistel(seed, epochs, indices, half_bits)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        values[outside] = _feistel(seed, epochs[outside], values[outside], half_bits)
        outside = outside[values[outside] >= count]
    return values


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
