"""The draws of `engine/philox.py` in a Triton kernel's registers."""

import triton
import triton.language as tl

from engine import philox

# Triton kernels see constants only as tl.constexpr.
NOISE = tl.constexpr(philox.NOISE)
POSTERIOR = tl.constexpr(philox.POSTERIOR)
NOISE_OFFSET = tl.constexpr(philox.NOISE_OFFSET)
INPUT_PERTURBATION = tl.constexpr(philox.INPUT_PERTURBATION)


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
def words_of(seed, group, slot, stream: tl.constexpr):
    group = group.to(tl.uint32)
    slot_low = tl.zeros_like(group) + (slot & 0xFFFFFFFF).to(tl.uint32)
    slot_high = tl.zeros_like(group) + ((slot >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, group, slot_low, slot_high, tl.zeros_like(group) + stream)


@triton.jit
def normals4(seed, group, slot, stream: tl.constexpr):
    """Unit normals for the four elements of each group of a [rows, groups] block: fp32 [rows, 4 * groups].

    `seed` and `slot` are int64 scalars, `group` an integer block of element // 4.
    """
    word_0, word_1, word_2, word_3 = words_of(seed, group, slot, stream)
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
    word_0, word_1, word_2, word_3 = words_of(seed, element // 4, slot, stream)
    second_pair = element % 4 >= 2
    radius = _radius(tl.where(second_pair, word_2, word_0))
    cosine, sine = _cosine_and_sine(tl.where(second_pair, word_3, word_1))
    return radius * tl.where(element % 2 == 0, cosine, sine)
