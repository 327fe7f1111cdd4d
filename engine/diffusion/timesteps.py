"""How timesteps are drawn: a monotone map, the inverse of a distribution function, takes the uniform number of a slot to one.

The map is in three parts, each a place in [0, 1] from a place in [0, 1]: a bias counts a range of timesteps for more or less; a
density bends what is uniform; the last stretches the result from the first timestep to the end.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine import philox
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.permutation import permuted

Density = Callable[[Tensor], Tensor]  # the inverse of its distribution function, in double precision
# Added to the seed for the permutation of strata: that of the records has the seed itself.
_STRATA = 0x7374726174756D


def uniform(places: Tensor) -> Tensor:
    return places


def logit_normal(mean: float, std: float) -> Density:
    """The logit of a timestep is normal (arXiv:2403.03206, section 3.1); a positive mean draws more of the noisy ones."""
    return lambda places: torch.sigmoid(mean + std * torch.special.ndtri(places))


def mode(scale: float) -> Density:
    """The density with heavy tails (arXiv:2403.03206, equation 20): mirrored in time as in probability, so that it rises."""
    return lambda places: places + scale * ((math.pi / 2 * places).cos().square() - 1 + places)


def cosmap(places: Tensor) -> Tensor:
    """The timesteps of a flow whose signal-to-noise ratios are those of the cosine schedule (arXiv:2403.03206, equation 21)."""
    return 1 - 1 / ((math.pi / 2 * places).tan() + 1)


@dataclass(frozen=True)
class Bias:
    """Draws timesteps of a range `multiplier` times as often, as the SDXL script does.

    strategy: `earlier` or `later`, the first or last `portion` of the timesteps that are drawn; or `range`, from `begin` to
        `end`, exclusive.
    end: None for that of the schedule.
    """

    strategy: Literal["earlier", "later", "range"]
    multiplier: float
    portion: float = 0.25
    begin: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Sampling:
    """What the options ask of the draw.

    stratified: one number from each of as many equal parts of [0, 1] as the global batch has samples.
    minimum, maximum: the first timestep that is drawn, and the end, exclusive; None for those of the schedule.
    """

    density: Density = uniform
    stratified: bool = False
    bias: Bias | None = None
    minimum: float | None = None
    maximum: float | None = None


UNIFORM = Sampling()


def sampling(config: TrainConfig) -> Sampling:
    """How the options want timesteps drawn."""
    density = {
        "logit_normal": logit_normal(config.logit_mean, config.logit_std), "mode": mode(config.mode_scale), "cosmap": cosmap,
    }.get(config.timestep_sampling, uniform)  # fmt: skip
    bias = None
    if config.timestep_bias_strategy != "none":
        bias = Bias(
            config.timestep_bias_strategy, config.timestep_bias_multiplier, config.timestep_bias_portion,
            config.timestep_bias_begin, config.timestep_bias_end,
        )  # fmt: skip
    stratified = config.timestep_sampling == "stratified"
    return Sampling(density, stratified, bias, config.min_timestep, config.max_timestep)


class Draw:
    """Draws timesteps of a schedule.

    Args:
        end: that of the schedule, exclusive: 1000 of integers, 1.0 of reals.
        integers: whether timesteps are whole numbers.

    Raises:
        UserError: a limit is outside the schedule or no timestep of it, or nothing is left between two.
    """

    def __init__(self, sampling: Sampling, end: float, integers: bool) -> None:
        self.density, self.stratified = sampling.density, sampling.stratified
        self.schedule_end, self.integers = end, integers
        self.first = self._limit("min_timestep", sampling.minimum, 0)
        self.end = self._limit("max_timestep", sampling.maximum, end)
        if not self.first < self.end:
            given = f"--min_timestep {self.first:g} --max_timestep {self.end:g}"
            raise UserError(f"{given}: none is left between them; give the first below the second")
        self.knots = self._knots(sampling.bias) if sampling.bias else None

    def __call__(self, seed: Tensor, slots: Tensor, global_batch: int) -> Tensor:
        """The timesteps of slots [B]: [B], int64, or reals in fp32. `seed` is int64 [1]."""
        places = philox.uniforms(seed, slots, philox.TIMESTEP, torch.float64)
        if self.stratified:
            strata = permuted(int(seed) + _STRATA, slots // global_batch, slots % global_batch, global_batch)
            places = (strata + places) / global_batch
        if self.knots is not None:
            places = self._biased(places, *self.knots)
        timesteps = self.first + (self.end - self.first) * self.density(places)
        return timesteps.floor().clamp(max=self.end - 1).long() if self.integers else timesteps.float()

    def grid(self, count: int) -> tuple[Tensor, list[str]]:
        """The timesteps in the middle of `count` even ranges of those that can be drawn: [count]; and the ranges, in words.

        Raises:
            UserError: there are not so many.
        """
        if self.integers and count > self.end - self.first:
            raise UserError(f"--validation_timesteps {count}: there are {self.end - self.first:g}; give that at the most")
        edges = self.first + (self.end - self.first) * torch.arange(count + 1, dtype=torch.float64) / count
        middles = (edges[:-1] + edges[1:]) / 2
        if not self.integers:
            return middles.float(), [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges.tolist())]
        ranges = itertools.pairwise(edges.long().tolist())
        return middles.floor().long(), [f"{low}-{next_low - 1}" for low, next_low in ranges]

    def _limit(self, option: str, value: float | None, default: float) -> float:
        if value is None:
            return default
        if self.integers and value != int(value):
            raise UserError(f"--{option} {value:g}: timesteps are whole numbers here, from 0 to {self.schedule_end:g}")
        if value > self.schedule_end:
            raise UserError(f"--{option} {value:g}: the schedule ends at {self.schedule_end:g}; give that at the most")
        return value

    def _knots(self, bias: Bias) -> tuple[float, float, float]:
        """Where in [0, 1] the range begins and ends before the density bends it, and its multiplier."""
        portion = bias.portion * (self.end - self.first)
        portion = math.floor(portion) if self.integers else portion
        if bias.strategy == "earlier":
            begin, end = self.first, self.first + portion
        elif bias.strategy == "later":
            begin, end = self.end - portion, self.end
        else:
            begin = self._limit("timestep_bias_begin", bias.begin, 0)
            end = self._limit("timestep_bias_end", bias.end, self.schedule_end)
        if not max(begin, self.first) < min(end, self.end):
            given = (
                f"--timestep_bias_begin {begin:g} --timestep_bias_end {end:g}: no timestep is between them"
                if bias.strategy == "range" else f"--timestep_bias_portion {bias.portion:g}: is no timestep"
            )  # fmt: skip
            raise UserError(f"{given} of those that are drawn, from {self.first:g} to {self.end:g}; give more")
        return self._place_of(begin), self._place_of(end), bias.multiplier

    def _place_of(self, timestep: float) -> float:
        """Where the density takes to a timestep, found by bisection."""
        wanted, low, high = (timestep - self.first) / (self.end - self.first), 0.0, 1.0
        if not 0 < wanted < 1:
            return min(max(wanted, 0.0), 1.0)
        for _ in range(64):
            middle = (low + high) / 2
            below = float(self.density(torch.tensor(middle, dtype=torch.float64))) < wanted
            low, high = (middle, high) if below else (low, middle)
        return high

    @staticmethod
    def _biased(places: Tensor, begin: float, end: float, multiplier: float) -> Tensor:
        """The places below which there is as much as below `places`, where what is from `begin` to `end` counts more."""
        inside = multiplier * (end - begin)
        mass = places * (begin + inside + 1 - end)
        within, after = begin + (mass - begin) / multiplier, mass - inside + (end - begin)
        return torch.where(mass < begin, mass, torch.where(mass < begin + inside, within, after))
