"""Counter-based random numbers: every draw of a run is a pure function of (seed, slot, stream, element).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = the 64-bit seed (low word,
high word) and counter = (element // 4, slot low, slot high, stream); element i takes word i % 4. Elements count in logical
(C, H, W) order whatever the memory format.

    uniform(u) = ((u >> 8) + 0.5) * 2^-24
    normals    = Box-Muller on the word pairs (0, 1) and (2, 3): with r = sqrt(-2 ln uniform(first)) and
                 phi = 2 pi uniform(second), the pair is (r cos phi, r sin phi)

The torch functions are the reference, and what the CPU uses; `normals4` is the same in a Triton kernel's registers.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a draw is for; the fourth word of the counter.
NOISE = 0
POSTERIOR = 1
TIMESTEP = 2
NOISE_OFFSET = 3
INPUT_PERTURBATION = 4
CAPTION = 5
IMAGE_VARIANT = 6
CAPTION_DROPOUT = 7

# The same for Triton kernels, which see constants only as tl.constexpr.
KERNEL_NOISE = tl.constexpr(NOISE)
KERNEL_POSTERIOR = tl.constexpr(POSTERIOR)
KERNEL_NOISE_OFFSET = tl.constexpr(NOISE_OFFSET)
KERNEL_INPUT_PERTURBATION = tl.constexpr(INPUT_PERTURBATION)

_WORD = 0xFFFFFFFF
_ROUND_0, _ROUND_1 = 0xD2511F53, 0xCD9E8D57
_KEY_0, _KEY_1 = 0x9E3779B9, 0xBB67AE85


def _split(value: Any) -> tuple[Any, Any]:
    """The low and high 32-bit words of int64 values."""
    return value & _WORD, (value >> 32) & _WORD


def philox_rounds(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """The four output words of Philox4x32-10, for int64 tensors, or for int64 numpy arrays, that broadcast.

    Words may be plain integers, but the first and the third.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product may wrap to a negative int64; its bits are right, and the masks take them.
        low_0, high_0 = _split(c0 * _ROUND_0)
        low_1, high_1 = _split(c2 * _ROUND_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_0) & _WORD, (k1 + _KEY_1) & _WORD
    return c0, c1, c2, c3


def philox_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """The same as one int64 tensor [..., 4]."""
    return torch.stack(torch.broadcast_tensors(*philox_rounds(counter, key)), dim=-1)


def draw_words(seed: Tensor, slots: Tensor, stream: int, groups: int) -> Tensor:
    """Words for elements 0 .. 4 * groups - 1 of each slot: int64 [B, groups, 4]. `seed` is int64 [1], `slots` int64 [B]."""
    group = torch.arange(groups, device=slots.device)[None, :]
    low, high = _split(slots[:, None])
    return philox_words((group, low, high, torch.full_like(group, stream)), _split(seed))


def normals(seed: Tensor, slots: Tensor, stream: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Unit normals, fp32 [B, *shape]: one independent draw per slot. `seed` is int64 [1], `slots` int64 [B]."""
    elements = math.prod(shape)
    words = draw_words(seed, slots, stream, -(-elements // 4))
    # In double precision, because the uniform itself does not fit fp32 near 1.
    uniform = ((words >> 8).double() + 0.5) * 2.0**-24
    radius = (-2 * uniform[..., 0::2].log()).sqrt()
    angle = (2 * math.pi) * uniform[..., 1::2]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :elements].float().view(-1, *shape)


def uniforms(seed: Tensor, slots: Tensor, stream: int) -> Tensor:
    """uniform of element 0 of each slot: fp32 [B] in [2^-25, 1]."""
    word = draw_words(seed, slots, stream, 1)[:, 0, 0]
    return (((word >> 8).double() + 0.5) * 2.0**-24).float()


def choices(seed: Tensor, slots: Tensor, stream: int, count: int | Tensor) -> Tensor:
    """floor(uniform * count) of element 0 of each slot: int64 [B] in 0 .. count - 1.

    Computed in integers, where nothing rounds. `count` may be int64 [B].
    """
    word = draw_words(seed, slots, stream, 1)[:, 0, 0]
    return ((2 * (word >> 8) + 1) * count) >> 25


@triton.jit
def _radius(word):
    """sqrt(-2 ln uniform(word)) within 1e-6; the root is the hardware's reciprocal one, good to 2^-22.

    Near 1 the uniform itself would round in fp32 and its logarithm would lose everything, so the logarithm is summed there
    from 1 - uniform, which is exact.
    """
    number = word >> 8
    uniform = (number.to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^-24
    rest = ((16777215 - number).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    series = rest * (1 + rest * (1 / 2 + rest * (1 / 3 + rest * (1 / 4 + rest * (1 / 5 + rest * (1 / 6))))))
    square = 2 * tl.where(rest < 0.03125, series, -tl.log(uniform))
    return square * tl.rsqrt(square)


@triton.jit
def _cosine_and_sine(word):
    """cos and sin of 2 pi uniform(word) to fp32 accuracy.

    The quarter turn and the exact remainder come from the integer, and polynomials (Cephes' for |x| <= pi / 4) do the rest:
    the general functions would carry a slow path for huge angles, with a stack frame, through every kernel.
    """
    number = (word >> 8).to(tl.int32)
    quarter = (number + (1 << 21)) >> 22
    x = ((number - (quarter << 22)).to(tl.float32) + 0.5) * (1.5707963267948966 / 4194304)  # pi / 2 * 2^-22
    square = x * x
    sine = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cosine = (
        1
        - 0.5 * square
        + square * square * (4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5))
    )
    odd = quarter % 2 == 1
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    return tl.where((quarter + 1) % 4 >= 2, -first, first), tl.where(quarter % 4 >= 2, -second, second)


@triton.jit
def _words(seed, group, slot, stream: tl.constexpr):
    group = group.to(tl.uint32)
    slot_low = tl.zeros_like(group) + (slot & 0xFFFFFFFF).to(tl.uint32)
    slot_high = tl.zeros_like(group) + ((slot >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, group, slot_low, slot_high, tl.zeros_like(group) + stream)


@triton.jit
def normals4(seed, group, slot, stream: tl.constexpr):
    """Unit normals for the four elements of each group of a [rows, groups] block: fp32 [rows, 4 * groups].

    `seed` and `slot` are int64 scalars, `group` an integer block of element // 4.
    """
    word_0, word_1, word_2, word_3 = _words(seed, group, slot, stream)
    radius_0, radius_1 = _radius(word_0), _radius(word_2)
    cosine_0, sine_0 = _cosine_and_sine(word_1)
    cosine_1, sine_1 = _cosine_and_sine(word_3)
    # Joining on a new last axis puts the second join innermost: (pair, cos or sin) in element order.
    cosines = tl.join(radius_0 * cosine_0, radius_1 * cosine_1)
    sines = tl.join(radius_0 * sine_0, radius_1 * sine_1)
    return tl.join(cosines, sines).reshape(group.shape[0], 4 * group.shape[1])


@triton.jit
def normal_of_element(seed, element, slot, stream: tl.constexpr):
    """The unit normal of every element of an integer block, fp32 of its shape; for draws that many elements share."""
    word_0, word_1, word_2, word_3 = _words(seed, element // 4, slot, stream)
    second_pair = element % 4 >= 2
    radius = _radius(tl.where(second_pair, word_2, word_0))
    cosine, sine = _cosine_and_sine(tl.where(second_pair, word_3, word_1))
    return radius * tl.where(element % 2 == 0, cosine, sine)
