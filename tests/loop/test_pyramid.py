"""Pyramid noise against its formula in double precision; `test_parity.py` trains with it."""

import pytest
import torch

from engine.loop.pyramid import draw_pyramid, sizes
from tests.objectives import coarse_noise

SEED = 2**35 + 9


@pytest.mark.parametrize(("shape", "levels", "number"), [((4, 8, 8), 6, 3), ((3, 12, 20), 2, 2), ((2, 9, 5), 6, 2)])
def test_coarse_noise_is_that_of_the_formula(shape, levels, number):
    slots = torch.arange(2**33, 2**33 + 3)
    assert len(sizes(*shape[1:], levels)) == number
    drawn = draw_pyramid(torch.tensor([SEED]), slots, torch.Size(shape), 0.6, levels)
    expected, variance = coarse_noise(SEED, slots.tolist(), shape, 0.6, levels)
    assert drawn.share == pytest.approx(variance**-0.5, rel=1e-6)
    torch.testing.assert_close(drawn.coarse.double(), expected * variance**-0.5, atol=2e-6, rtol=0)
    again = draw_pyramid(torch.tensor([SEED]), slots[1:2], torch.Size(shape), 0.6, levels).coarse
    assert torch.equal(again, drawn.coarse[1:2])  # whatever batch a slot is in


def test_the_noise_has_unit_variance_at_every_place():
    slots = torch.arange(3000)
    drawn = draw_pyramid(torch.tensor([SEED]), slots, torch.Size((2, 8, 8)), 0.9, 6)
    variance = drawn.share**2 + drawn.coarse.square().mean(dim=(0, 1))
    assert bool(((variance - 1).abs() < 5 * (2 / 6000) ** 0.5).all())
