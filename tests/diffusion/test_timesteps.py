"""Distributions of timesteps against their formulas, stratification, and the limits of what is drawn."""

import itertools
import math

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from engine import philox
from engine.config.options import TrainConfig
from engine.diffusion.timesteps import UNIFORM, Draw, mode, sampling
from engine.errors import UserError
from tests import reference

SEED = torch.tensor([2**33 + 5])
COUNT = 2**15


def draw(slots=None, end=1000, integers=True, global_batch=COUNT, **options) -> torch.Tensor:
    wanted = sampling(TrainConfig(family="wuerstchen", **options))
    slots = torch.arange(COUNT) if slots is None else slots
    return Draw(wanted, end, integers)(SEED, slots, global_batch)


def shares(timesteps: torch.Tensor, parts: int = 20, end: float = 1000) -> list[float]:
    """Which share of the draws is in each of equal parts of the schedule."""
    return (torch.histc(timesteps.double(), parts, 0, end) / len(timesteps)).tolist()


def test_uniform_timesteps_are_those_of_the_slot_contract():
    slots = torch.arange(2**20, 2**20 + 4096)
    for count in (2, 999, 1000, 4096):
        assert torch.equal(Draw(UNIFORM, count, True)(SEED, slots, 8), philox.choices(SEED, slots, philox.TIMESTEP, count))
    assert draw(slots[:32]).tolist() == [reference.choice(int(SEED), int(slot), 2, 1000) for slot in slots[:32]]
    assert torch.equal(draw(slots, 1.0, False), philox.uniforms(SEED, slots, philox.TIMESTEP))


def normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def distribution_of_mode(t: float, scale: float = 0.7) -> float:
    """By a fine grid over the published map, which falls where ours rises."""
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    return float((1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u) < t).double().mean())


DENSITIES = {
    "uniform": ({}, lambda t: t),
    "stratified": ({}, lambda t: t),
    "logit_normal": ({"logit_mean": -0.5, "logit_std": 1.5}, lambda t: normal((math.log(t / (1 - t)) + 0.5) / 1.5)),
    "mode": ({"mode_scale": 0.7}, distribution_of_mode),
    "cosmap": ({}, lambda t: 2 / math.pi * math.atan(t / (1 - t))),
}


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize(("end", "integers"), [(1000, True), (1.0, False)])
def test_densities_are_those_of_the_paper(name, end, integers):
    given, below = DENSITIES[name]
    edges = [0, *(below(part / 20) for part in range(1, 20)), 1]
    drawn = draw(end=end, integers=integers, timestep_sampling=name, **given)
    assert drawn.dtype == (torch.int64 if integers else torch.float32)
    expected = [after - before for before, after in itertools.pairwise(edges)]
    assert shares(drawn, end=end) == pytest.approx(expected, abs=5 / math.sqrt(12 * COUNT))


def test_the_map_of_mode_is_the_published_one_mirrored():
    torch.manual_seed(3)
    published = compute_density_for_timestep_sampling("mode", batch_size=64, mode_scale=1.29)
    torch.manual_seed(3)
    places = torch.rand(64)
    torch.testing.assert_close(mode(1.29)(1 - places.double()).float(), published, atol=1e-6, rtol=0)
    rising = mode(TrainConfig(family="sd", mode_scale=2 / (math.pi - 2)).mode_scale)(torch.linspace(0, 1, 999).double())
    assert bool((rising.diff() >= -1e-15).all())


BIASES = {
    "earlier": ({"timestep_bias_portion": 0.3}, slice(0, 300)),
    "later": ({"timestep_bias_portion": 0.1}, slice(900, 1000)),
    "range": ({"timestep_bias_begin": 200, "timestep_bias_end": 450}, slice(200, 450)),
}


@pytest.mark.parametrize("density", ["uniform", "stratified", "logit_normal"])
@pytest.mark.parametrize("multiplier", [0.25, 3.0])
@pytest.mark.parametrize("strategy", BIASES)
def test_a_bias_weighs_timesteps_as_the_script_does(strategy, multiplier, density):
    given, biased = BIASES[strategy]
    drawn = draw(
        timestep_bias_strategy=strategy, timestep_bias_multiplier=multiplier, timestep_sampling=density, **given
    )  # fmt: skip
    below = DENSITIES["uniform"][1] if density != "logit_normal" else lambda t: normal(math.log(t / (1 - t)))
    edges = torch.tensor([0.0, *(below(t / 1000) for t in range(1, 1000)), 1.0])
    weights = edges.diff()
    weights[biased] *= multiplier
    expected = (weights / weights.sum()).view(20, 50).sum(1).tolist()
    assert shares(drawn) == pytest.approx(expected, abs=5 / math.sqrt(12 * COUNT))


def test_limits_are_of_integers_from_the_first_to_the_end_and_the_shape_is_stretched_between():
    drawn = draw(min_timestep=100, max_timestep=110)
    assert drawn.unique().tolist() == list(range(100, 110))
    drawn = draw(min_timestep=200, max_timestep=600, timestep_sampling="logit_normal", timestep_bias_strategy="later",
                 timestep_bias_multiplier=2, timestep_bias_portion=0.5)  # fmt: skip
    assert drawn.min() >= 200
    assert drawn.max() < 600
    assert float((drawn >= 400).double().mean()) == pytest.approx(2 / 3, abs=0.01)
    reals = draw(end=1.0, integers=False, min_timestep=0.25, max_timestep=0.5)
    assert float(reals.min()) == pytest.approx(0.25, abs=1e-3)
    assert float(reals.max()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("density", ["logit_normal", "mode", "cosmap"])
def test_extremes_stay_in_the_schedule(density):
    steep = {"logit_std": 30.0} if density == "logit_normal" else {}
    drawn = draw(timestep_sampling=density, **steep)
    assert drawn.min() >= 0
    assert drawn.max() <= 999


def test_strata_have_one_timestep_each_in_every_global_batch():
    batch = 250
    slots = torch.arange(7 * batch)
    drawn = draw(slots, timestep_sampling="stratified", global_batch=batch)
    for step in range(7):
        assert sorted((drawn[step * batch : (step + 1) * batch] // 4).tolist()) == list(range(batch))
    # The order differs from step to step, and the draw does not depend on how slots are divided.
    assert drawn[:batch].tolist() != drawn[batch : 2 * batch].tolist()
    assert torch.equal(draw(slots[60:400], timestep_sampling="stratified", global_batch=batch), drawn[60:400])


def test_strata_have_nothing_to_do_with_the_order_of_the_records():
    from engine.data.samples.order import records_of

    slots = torch.arange(64 * 8)  # a data set of one batch per epoch
    strata = draw(slots, timestep_sampling="stratified", global_batch=64) * 64 // 1000
    assert float((strata == records_of(int(SEED), slots, 64)).double().mean()) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_timestep": 10.5}, "--min_timestep 10.5: timesteps are whole numbers here, from 0 to 1000"),
        ({"max_timestep": 1001}, "--max_timestep 1001: the schedule ends at 1000"),
        ({"min_timestep": 500, "max_timestep": 500}, "none is left between"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 300, "timestep_bias_end": 200},
            "no timestep is between",
        ),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 0, "timestep_bias_end": 200, "min_timestep": 200},
            "--timestep_bias_begin 0 --timestep_bias_end 200: no timestep is between them of those that are drawn, from 200 to",
        ),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_portion": 0.2, "min_timestep": 10, "max_timestep": 14},
            "--timestep_bias_portion 0.2: is no timestep of those that are drawn, from 10 to 14; give more",
        ),
    ],
)
def test_limits_that_the_schedule_does_not_have_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        draw(**options)
