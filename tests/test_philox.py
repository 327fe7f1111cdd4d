"""The random numbers of the slot contract: words, normals and choices."""

import numpy as np
import pytest
import torch

from engine import philox
from tests import reference

ONES = 0xFFFFFFFF

# Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, words.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_those_of_random123(counter, key, words):
    ours = philox.philox_words(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert ours.tolist() == words
    assert reference.philox(np.array(counter, np.uint64), tuple(key)).tolist() == words


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 7, 2**63 - 1, -1])
@pytest.mark.parametrize("stream", [0, 3, 7])
def test_draws_agree_with_an_independent_implementation(seed, stream):
    slots = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**45 + 3])
    words = philox.draw_words(torch.tensor([seed]), slots, stream, 5).flatten(1)
    for row, slot in zip(words.tolist(), slots.tolist(), strict=True):
        assert row == reference.words(seed, slot, stream, 20).tolist()


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 8, 8), (3, 5, 7)])
def test_normals_follow_the_formula_in_double_precision(shape):
    slots = [5, 2**40]
    ours = philox.normals(torch.tensor([9]), torch.tensor(slots), philox.NOISE, shape)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), reference.normals(9, slots, 0, shape), atol=1e-6, rtol=0)


def test_normals_have_the_moments_of_a_unit_normal():
    draws = philox.normals(torch.tensor([1]), torch.arange(64), philox.NOISE, (4, 64, 64)).double().flatten()
    count = draws.numel()
    # Standard errors of the moments of a unit normal: 1, sqrt 2, sqrt 15, sqrt 96 over the root of the count.
    for power, expected, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float((draws**power).mean()) - expected) < 5 * spread / count**0.5


def test_slots_streams_seeds_and_elements_are_uncorrelated():
    shape = (4, 64, 64)
    rows = [
        philox.normals(torch.tensor([seed]), torch.tensor([slot]), stream, shape).flatten()
        for seed in (1, 2, 1 + 2**32)
        for slot in (0, 1, 2**32)
        for stream in range(8)
    ]
    draws = torch.stack(rows).double()
    correlation = draws @ draws.T / draws.shape[1]
    off_diagonal = correlation - torch.diag(correlation.diag())
    assert float(off_diagonal.abs().max()) < 6 / draws.shape[1] ** 0.5
    for lag in (1, 2, 3, 4, 64, 4096):
        product = (draws[:, :-lag] * draws[:, lag:]).mean()
        assert abs(float(product)) < 6 / (draws.shape[0] * draws.shape[1]) ** 0.5


def test_choices_are_the_floor_of_an_exact_uniform():
    slots = torch.arange(500)
    for count in (1, 2, 3, 1000, 2**20 + 1):
        ours = philox.choices(torch.tensor([3]), slots, philox.TIMESTEP, count)
        assert ours.tolist() == [reference.choice(3, slot, 2, count) for slot in range(500)]


def test_the_largest_word_is_still_a_valid_choice():
    # uniform rounds to 1.0 in fp32 for the largest words; the integer form must not.
    word = torch.tensor(ONES)
    assert int(((2 * (word >> 8) + 1) * 1000) >> 25) == 999


def test_choices_cover_the_range_evenly():
    draws = philox.choices(torch.tensor([0]), torch.arange(100_000), philox.TIMESTEP, 10)
    counts = torch.bincount(draws, minlength=10).double()
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 35  # chi-squared, 9 degrees of freedom, p < 1e-4


def test_choices_take_a_count_per_slot():
    counts = torch.tensor([1, 2, 7, 100])
    draws = philox.choices(torch.tensor([5]), torch.arange(4), philox.CAPTION, counts)
    assert draws.tolist() == [reference.choice(5, slot, 5, int(count)) for slot, count in enumerate(counts)]
