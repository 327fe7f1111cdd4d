"""Counter-based random numbers: every draw of a run is a pure function of (seed, slot, stream, element).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = the 64-bit seed (low word,
high word) and counter = (element // 4, slot low, slot high, stream); element i takes word i % 4. Elements count in logical
(C, H, W) order whatever the memory format.

    uniform(u) = ((u >> 8) + 0.5) * 2^-24
    normals    = Box-Muller on the word pairs (0, 1) and (2, 3): with r = sqrt(-2 ln uniform(first)) and
                 phi = 2 pi uniform(second), the pair is (r cos phi, r sin phi)

The functions here are the reference, in torch; `kernels/philox.py` and `cpp_ext/operations.cpp` draw the same in registers.
"""

import math
from typing import Any

import torch
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
ROUNDING = 8
DROPOUT = 9

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


def uniforms(seed: Tensor, slots: Tensor, stream: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """uniform of element 0 of each slot: [B], in fp64 from 2^-25 to 1 - 2^-25, in fp32 rounded, which may make it 1."""
    word = draw_words(seed, slots, stream, 1)[:, 0, 0]
    return (((word >> 8).double() + 0.5) * 2.0**-24).to(dtype)


def chances(seed: Tensor, slots: Tensor, stream: int, proportion: float) -> Tensor:
    """Whether uniform of element 0 of each slot is below `proportion`, without rounding: bool [B]; of 1 always, of 0 never."""
    word = draw_words(seed, slots, stream, 1)[:, 0, 0]
    return ((word >> 8).double() + 0.5) * 2.0**-24 < proportion


def choices(seed: Tensor, slots: Tensor, stream: int, count: int | Tensor) -> Tensor:
    """floor(uniform * count) of element 0 of each slot: int64 [B] in 0 .. count - 1.

    Computed in integers, where nothing rounds. `count` may be int64 [B].
    """
    word = draw_words(seed, slots, stream, 1)[:, 0, 0]
    return ((2 * (word >> 8) + 1) * count) >> 25
