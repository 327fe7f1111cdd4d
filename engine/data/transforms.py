"""Image preprocessing with PIL, to the pixel what the scripts' torchvision transforms do on PIL images."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine import philox

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


def crop_centre_square(image: Image.Image) -> Image.Image:
    """The largest square around the centre, with the Kandinsky script's corners: PIL rounds their halves to even, which may
    make the square a pixel wider or narrower than the shorter side."""
    width, height = image.size
    size = min(width, height)
    return image.crop(((width - size) / 2, (height - size) / 2, (width + size) / 2, (height + size) / 2))


def _pixels(image: Image.Image) -> Tensor:
    """An RGB image as fp32 [3, H, W] in 0 .. 255."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float()


def to_tensor(image: Image.Image, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3) -> Tensor:
    """An RGB image as fp32 [3, H, W]: scaled to [0, 1], then normalised per channel; by default to [-1, 1]."""
    return (_pixels(image) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def to_tensor_by_half_range(image: Image.Image) -> Tensor:
    """An RGB image as fp32 [3, H, W] in [-1, 1] as the Kandinsky script computes it; `to_tensor` rounds otherwise."""
    return _pixels(image) / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures of pixels [B, 3, H, W] in [-1, 1]."""
    values = (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(value.cpu().numpy()) for value in values]
