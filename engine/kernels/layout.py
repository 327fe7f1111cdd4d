"""How the fused kernels walk over samples: one tile shape for contiguous and channels-last memory.

A sample is C channels of P positions (P = H * W), and its elements count c * P + p. A program takes a tile of ROWS channels
and 4 * GROUPS positions, so that one Philox call fills four neighbouring elements, and the tile covers a contiguous piece of
memory in either format: few channels and many positions, or all channels and fewer positions. Where P is not a multiple of 4 a
group would straddle two channels; such samples are walked as one row of C * P positions, and must be contiguous.

A tile has 256 to 1,024 elements, 8 per thread, and of the shapes that fit the one that leaves the fewest lanes without an
element: Kandinsky's prior takes its 1,280 positions as 5 times 256, Wuerstchen 16 channels by 64 of its 24 * 24 positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ELEMENTS = (256, 1024)
THREAD_ELEMENTS = 8
MAX_ROWS = 64
MIN_WIDTH = 16  # positions: 32 bytes in bf16, the least that memory moves


@dataclass(frozen=True)
class Tiling:
    """The launch of a kernel over tensors [B, C, P].

    rows, groups: the tile is rows x 4 * groups elements.
    channels, positions: what the kernel takes a sample to be: (C, P), or (1, C * P) when walked as one row.
    """

    rows: int
    groups: int
    channels: int
    positions: int

    @property
    def elements(self) -> int:
        return 4 * self.rows * self.groups

    @property
    def num_warps(self) -> int:
        return self.elements // (32 * THREAD_ELEMENTS)

    def grid(self, batch: int) -> tuple[int, int, int]:
        return (-(-self.positions // (4 * self.groups)), -(-self.channels // self.rows), batch)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is stored with its channels innermost and not (also) contiguous."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def positions_of(tensor: Tensor) -> int:
    """P of a tensor [B, C, ...]: the number of elements of one channel."""
    return tensor.shape[2:].numel()


def tile(tensor: Tensor, channels: int) -> Tiling:
    """The tiling for the first `channels` channels of tensors in the memory format and of the shape of `tensor` [B, C, ...]."""
    positions = positions_of(tensor)
    if positions % 4:
        channels, positions = 1, channels * positions
    most_rows = min(1 << (channels - 1).bit_length(), MAX_ROWS)
    channels_last = is_channels_last(tensor) and positions % 4 == 0
    smallest, largest = TILE_ELEMENTS
    tilings = [
        Tiling(rows, elements // rows // 4, channels, positions)
        for elements in (largest, largest // 2, smallest)
        for rows in ((most_rows,) if channels_last else (1 << power for power in range(most_rows.bit_length())))
        if channels_last or elements // rows >= MIN_WIDTH
    ]
    # The first of the best: the largest tile, and then the one with the longest rows.
    return min(tilings, key=lambda tiling: math.prod(tiling.grid(1)) * tiling.elements)


def walkable(tensor: Tensor) -> Tensor:
    """`tensor` itself where a kernel can walk it by three strides, else a contiguous copy.

    That is: contiguous, or channels-last with P a multiple of 4.
    """
    if is_channels_last(tensor) and positions_of(tensor) % 4 == 0:
        return tensor
    return tensor.contiguous()


def stored_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` itself where its elements lie as those of `other`, else a copy that does."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """For the reference of a kernel, which adds up in fp32; double precision stays, for checks of the formulas."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def strides(tensor: Tensor, tiling: Tiling) -> tuple[int, int, int]:
    """Strides of a walkable tensor over (sample, channel, position) as `tiling` counts them."""
    if tiling.channels == 1 and tiling.positions != positions_of(tensor):
        return tensor.stride(0), 0, 1
    if is_channels_last(tensor):
        return tensor.stride(0), 1, tensor.shape[1]
    return tensor.stride(0), positions_of(tensor), 1
