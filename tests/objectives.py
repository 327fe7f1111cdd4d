"""The objectives of training by the formulas of their papers, for numbers and tensors in double precision, without the engine.

What is shared with it is what the contract of slots names: the uniform number of a slot, and a keyed permutation.
"""

import math
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from engine.config.options import TrainConfig
from engine.permutation import permuted
from tests import reference

STRATA = 0x7374726174756D  # what is added to the seed for the permutation of strata
LEVELS = 0x707972616D69  # and for every level of a pyramid


def weight_of_noise(config: TrainConfig, snr: float) -> float:
    """What the squared error of the noise counts for."""
    gamma = config.snr_gamma or 5.0
    return {
        None: lambda: min(snr, gamma) / snr if config.snr_gamma else 1.0,
        "min_snr": lambda: min(snr, gamma) / snr,
        "soft_min_snr": lambda: 1 / (1 / snr + 1 / gamma) / snr,
        "p2": lambda: 1 / (config.p2_k + snr) ** config.p2_gamma,
        "debiased": lambda: 1 / math.sqrt(snr),
        "edm": lambda: (1 / snr + config.edm_sigma_data**2) / (snr**-0.5 * config.edm_sigma_data) ** 2 / snr,
    }[config.loss_weighting]()


def weight(config: TrainConfig, snr: float, prediction_type: str) -> float:
    """What the squared error of the prediction counts for: that of v is SNR + 1 times that of x0, that of noise SNR times."""
    if config.loss_weighting is None and not config.snr_gamma:
        return 1.0
    snr = max(snr, 1e-30)
    as_predicted = {"epsilon": 1.0, "v_prediction": snr / (snr + 1), "sample": snr}[prediction_type]
    return max(weight_of_noise(config, snr) * as_predicted, config.min_loss_weight)


def threshold(config: TrainConfig, snr: float, progress: float) -> float:
    """Huber's c of a timestep."""
    c = config.huber_c
    sigma = math.inf if snr == 0 else snr**-0.5
    return {"constant": c, "exponential": c**progress, "snr": (1 - c) / (1 + sigma) ** 2 + c}[config.huber_schedule]


def losses(config: TrainConfig, error: Tensor, snr: Tensor, progress: Tensor, prediction_type: str) -> Tensor:
    """The weighted loss of each sample [B] from the error of its prediction [B, ...]."""
    weights = torch.tensor([weight(config, float(each), prediction_type) for each in snr])
    if config.loss_type == "l2":
        elements = error.square()
    else:
        each = zip(snr.tolist(), progress.tolist(), strict=True)
        c = torch.tensor([threshold(config, *sample) for sample in each]).view(-1, *[1] * (error.dim() - 1))
        elements = 2 * c * ((error.square() + c.square()).sqrt() - c)
        elements = elements / c if config.loss_type == "smooth_l1" else elements
    return elements.flatten(1).mean(1) * weights


def below(config: TrainConfig, place: float) -> float:
    """The share of the draws below a place between the first timestep, 0, and the end, 1."""
    if not 0 < place < 1:
        return min(max(place, 0.0), 1.0)
    if config.timestep_sampling == "logit_normal":
        return NormalDist(config.logit_mean, config.logit_std).cdf(math.log(place / (1 - place)))
    if config.timestep_sampling == "cosmap":
        return 2 / math.pi * math.atan(place / (1 - place))
    if config.timestep_sampling == "mode":  # the published map falls; it is brought to the place by bisection
        low, high = 0.0, 1.0
        for _ in range(60):
            u = (low + high) / 2
            value = 1 - u - config.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
            low, high = (u, high) if value > place else (low, u)
        return 1 - low
    return place


def shares(config: TrainConfig, count: int) -> np.ndarray:
    """How often each of `count` timesteps is drawn: [count]."""
    first, end = int(config.min_timestep or 0), int(config.max_timestep or count)
    edges = [below(config, (timestep - first) / (end - first)) for timestep in range(count + 1)]
    found, number = np.diff(edges), int(config.timestep_bias_portion * (end - first))
    biased = {
        "none": slice(0, 0),
        "earlier": slice(first, first + number),
        "later": slice(end - number, end),
        "range": slice(int(config.timestep_bias_begin), int(config.timestep_bias_end or count)),
    }[config.timestep_bias_strategy]
    found[biased] *= config.timestep_bias_multiplier
    return found / found.sum()


def uniforms(config: TrainConfig, seed: int, slots: list[int], global_batch: int) -> np.ndarray:
    found = np.array([(int(reference.words(seed, slot, 2, 1)[0]) // 256 + 0.5) / 2**24 for slot in slots])
    if config.timestep_sampling != "stratified":
        return found
    steps, positions = (torch.tensor(values) for values in zip(*(divmod(slot, global_batch) for slot in slots), strict=True))
    return (permuted(seed + STRATA, steps, positions, global_batch).numpy() + found) / global_batch


def timesteps(config: TrainConfig, seed: int, slots: list[int], global_batch: int, count: int) -> Tensor:
    """Integers [B] below `count`, as the options want them drawn."""
    cumulative = np.cumsum(shares(config, count))
    return torch.from_numpy(np.searchsorted(cumulative, uniforms(config, seed, slots, global_batch), side="right"))


def real_timesteps(config: TrainConfig, seed: int, slots: list[int], global_batch: int) -> Tensor:
    """Reals [B] in [0, 1], of a uniform or logit-normal density without a bias."""
    places = uniforms(config, seed, slots, global_batch)
    if config.timestep_sampling == "logit_normal":
        normal = NormalDist(config.logit_mean, config.logit_std)
        places = np.array([1 / (1 + math.exp(-normal.inv_cdf(place))) for place in places])
    first, end = config.min_timestep or 0.0, config.max_timestep or 1.0
    return torch.from_numpy(first + (end - first) * places).float()


def coarse_noise(seed: int, slots: list[int], shape, discount: float, levels: int) -> tuple[Tensor, float]:
    """The coarser levels of pyramid noise, fp64 [B, C, H, W], and the variance of them with the noise of single elements."""
    channels, height, width = shape
    total, variance = torch.zeros(len(slots), *shape, dtype=torch.float64), 1.0
    for level in range(1, levels + 1):
        few = channels, height // 2**level, width // 2**level
        if 0 in few:
            break
        noise = torch.from_numpy(reference.normals(seed + level * LEVELS, slots, 0, few))
        # The variance of an interpolated place, by the squares of what it takes of every place before.
        each = torch.eye(few[1] * few[2], dtype=torch.float64).view(-1, 1, few[1], few[2])
        places = interpolate(each, (height, width), mode="bilinear").square().sum(dim=(0, 1))
        even = places.mean() / places
        total += discount**level * interpolate(noise, (height, width), mode="bilinear") * even.sqrt()
        variance += discount ** (2 * level) * float(places.mean())
    return total, variance


def with_pyramid(config: TrainConfig, noise: Tensor, seed: int, slots: list[int]) -> Tensor:
    """Noise [B, C, H, W] with the coarser levels that the options ask for."""
    if not config.pyramid_noise_discount:
        return noise
    levels = config.pyramid_noise_iterations
    coarse, variance = coarse_noise(seed, slots, noise.shape[1:], config.pyramid_noise_discount, levels)
    return ((noise + coarse) / variance**0.5).float()
