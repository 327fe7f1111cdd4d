"""Image preprocessing with PIL, to the pixel what the scripts' torchvision transforms do on PIL images."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.kernels import philox

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

# Stored crops must not depend on the seed of a run, so that runs can share shards.
_CROP_SEED = 0


def resize_short_side(image: Image.Image, size: int, resampling: Image.Resampling) -> Image.Image:
    """Resizes so that the shorter side has `size` pixels; the longer one is rounded down."""
    width, height = image.size
    if min(width, height) == size:
        return image
    long_side = int(size * max(width, height) / min(width, height))
    return image.resize((size, long_side) if width <= height else (long_side, size), resampling)


def crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def crop_centre(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    return crop(image, round((width - size) / 2.0), round((height - size) / 2.0), size)


def crop_randomly(image: Image.Image, size: int, record: int, count: int) -> list[Image.Image]:
    """`count` uniformly placed crops, or one where every crop would be the same; a pure function of the record's number."""
    width, height = image.size
    if (width, height) == (size, size):
        return [image]
    draws = torch.tensor([record * count + variant for variant in range(count)])
    seed = torch.tensor([_CROP_SEED])
    words = philox.draw_words(seed, draws, philox.IMAGE_VARIANT, 1)[:, 0]
    # Integer arithmetic, as in philox.choices: word 0 places the crop across, word 1 down.
    lefts = ((2 * (words[:, 0] >> 8) + 1) * (width - size + 1)) >> 25
    tops = ((2 * (words[:, 1] >> 8) + 1) * (height - size + 1)) >> 25
    return [crop(image, int(left), int(top), size) for left, top in zip(lefts, tops, strict=True)]


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as fp32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5
