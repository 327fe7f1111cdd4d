"""The tiles in which samples are walked: no family's latents leave lanes without an element."""

import math

import pytest
import torch

from engine.kernels.layout import TILE_ELEMENTS, tile

# Latents of the families at their published sizes: SD and Kandinsky's decoder at 512 and 768 px, Kandinsky's prior,
# Wuerstchen at 512, 768 and 1024 px.
LATENTS = [(4, 64, 64), (4, 96, 96), (1280,), (16, 12, 12), (16, 24, 24), (16, 32, 32)]


def idle_share(shape: tuple[int, ...], channels: int, layout: str) -> float:
    """The share of all programs' lanes that hold no element of the first `channels` channels."""
    memory_format = torch.channels_last if layout == "channels_last" and len(shape) == 3 else torch.contiguous_format
    tiling = tile(torch.empty(2, *shape, device="meta").contiguous(memory_format=memory_format), channels)
    assert TILE_ELEMENTS[0] <= tiling.elements <= TILE_ELEMENTS[1]
    assert tiling.num_warps * 32 * 8 == tiling.elements
    return 1 - channels * math.prod(shape[1:]) / (math.prod(tiling.grid(1)) * tiling.elements)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LATENTS, ids=str)
def test_no_lane_is_idle_at_the_families_sizes(shape, layout):
    assert idle_share(shape, shape[0], layout) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [64, 96])
def test_channels_of_a_learned_variance_take_no_lane(side, layout):
    assert idle_share((8, side, side), 4, layout) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(40, 72), (72, 72), (56, 104), (48, 80), (15, 20)])
def test_few_lanes_are_idle_at_other_sizes(size, layout):
    assert idle_share((4, *size), 4, layout) <= 1 / 16


def test_large_samples_take_large_tiles_in_contiguous_pieces():
    contiguous, channels_last = (
        tile(torch.empty(2, 4, 64, 64, device="meta").contiguous(memory_format=memory_format), 4)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )
    assert (contiguous.rows, contiguous.groups) == (1, 256)
    assert (channels_last.rows, channels_last.groups) == (4, 64)
