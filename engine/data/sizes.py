"""Aspect-ratio buckets: which sizes there are, and to which of them each image of a data set is brought.

An image goes to the bucket of the nearest ratio, nearest by the share of it that is cropped away; exactly between two, to that
nearer to a square. Of buckets of one ratio it goes to the largest that it fills, or to the smallest.
"""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np

from engine.config.options import CacheConfig
from engine.data.format.buckets import Size, size_named
from engine.models.encoder import Encoding


def sizes_of(config: CacheConfig, encoding: Encoding) -> list[Size]:
    """The sizes that --buckets names or makes, from the narrowest to the widest.

    Raises:
        UserError: the models cannot take one.
    """
    if isinstance(config.buckets, list):
        sizes = {size_named(name) for name in config.buckets}
        for size in sorted(sizes):
            encoding.check_sides("--buckets", *size)
    else:
        encoding.check_sides("--bucket_step", config.bucket_step)
        sizes = made(config.bucket_step, config.bucket_area or config.resolution**2, config.bucket_max_ratio)
    return sorted(sizes, key=lambda size: (Fraction(*size), size))


def made(step: int, area: int, max_ratio: float) -> set[Size]:
    """Sizes in steps: of every length of one side the one with the most pixels, upright and lying, and the largest square."""
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for long in range(square, math.isqrt(int(area * max_ratio)) + step, step):
        short = area // long // step * step
        if 0 < short <= long <= max_ratio * short:
            sizes |= {(long, short), (short, long)}
    return sizes


def options_of_buckets(config: CacheConfig) -> dict[str, Any]:
    """What decides the sizes, as `buckets.json` has it."""
    if isinstance(config.buckets, list):
        return {"buckets": sorted(config.buckets)}
    return {
        "buckets": True,
        "bucket_step": config.bucket_step,
        "bucket_area": config.bucket_area or config.resolution**2,
        "bucket_max_ratio": config.bucket_max_ratio,
    }


def nearest(sizes: list[Size], images: np.ndarray) -> np.ndarray:
    """The place in `sizes` of each image's bucket: int64 [images].

    Args:
        sizes: from the narrowest to the widest.
        images: widths and heights, int64 [images, 2]; none above 0 where nobody knows, which go to where a square does.
    """
    ratios = sorted({Fraction(*size) for size in sizes})
    of_ratio = [[place for place, size in enumerate(sizes) if Fraction(*size) == ratio] for ratio in ratios]
    cuts = np.array([math.sqrt(one * other) for one, other in itertools.pairwise(ratios)])
    widths, heights = np.maximum(images, 1).T
    ratio = widths / heights
    chosen = np.where(ratio < 1, np.searchsorted(cuts, ratio, side="right"), np.searchsorted(cuts, ratio, side="left"))
    places = np.array([min(group, key=lambda place: sizes[place]) for group in of_ratio])[chosen]
    for number, group in enumerate(of_ratio):
        for place in sorted(group, key=lambda place: sizes[place])[1:]:
            fills = (chosen == number) & (widths >= sizes[place][0]) & (heights >= sizes[place][1])
            places[fills] = place
    return places


def cropped_away(size: Size, images: np.ndarray) -> np.ndarray:
    """The share of each image's area that lies outside of its largest part of a size's ratio: float64 [images]."""
    relative = images[:, 0] * size[1] / (images[:, 1] * size[0])
    return 1 - np.minimum(relative, 1 / relative)
