"""Stochastic rounding to bf16: up or down by chance, so that the mean is right and steps below the last digit add up.

The chance is counter-based (`engine/philox.py`), a pure function of the run's seed, the step, the number of the weights (in the
counter's third word) and the element, so that a run repeats and neither threads nor blocks show. One call serves four elements
that are `QUARTER` apart, so that no thread needs another's words: element e takes word (e // QUARTER) % 4 of counter
(e // TILE) * QUARTER + e % QUARTER. The low 16 bits of a word round the weight, by every digit that bf16 lacks; 8 bits each
round the moments, whose mean is so off by at most 2^-9 of their last digit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine import philox
from engine.kernels.philox import words_of

QUARTER = 1024  # elements
TILE = 4 * QUARTER
ROUNDING = tl.constexpr(philox.ROUNDING)


@triton.jit
def rounding_words(rounding_pointer, step, counter):
    """Four words for each counter of an integer block; `rounding_pointer` as `reference_words` takes it, `step` fp32."""
    slot = step.to(tl.int64) + (tl.load(rounding_pointer + 1) << 32)
    return words_of(tl.load(rounding_pointer), counter, slot, ROUNDING)


@triton.jit
def of_weight(word):
    return word & 0xFFFF


@triton.jit
def of_moment(word, NUMBER: tl.constexpr):
    return (((word >> (16 + 8 * NUMBER)) & 0xFF) << 8) + 0x80


@triton.jit
def round_to_bf16(value, noise):
    """An fp32 block rounded to what bf16 holds, up where the digits that are lost and `noise`, 16 bits, add up to one."""
    bits = value.to(tl.uint32, bitcast=True) + noise
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


def reference_words(rounding: Tensor, step: Tensor, elements: int) -> Tensor:
    """The word of every element: int64 [elements].

    Args:
        rounding: int64 [2]: the run's seed, and the number of these weights among those that it rounds.
        step: fp32 [1].
    """
    tiles = -(-elements // TILE)
    slot = step.to(torch.int64) + (rounding[1:] << 32)
    words = philox.draw_words(rounding[:1], slot, philox.ROUNDING, tiles * QUARTER)[0]
    return words.view(tiles, QUARTER, 4).transpose(1, 2).reshape(-1)[:elements]


def reference_round(value: Tensor, noise: Tensor) -> Tensor:
    """As `round_to_bf16`: fp32 of the same shape, which bf16 holds; `noise` is int64."""
    bits = (value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + noise
    kept = bits & 0xFFFF0000
    return (kept - ((kept >> 31) << 32)).to(torch.int32).view(torch.float32)


def reference_of_moment(word: Tensor, number: int) -> Tensor:
    return (((word >> (16 + 8 * number)) & 0xFF) << 8) + 0x80
