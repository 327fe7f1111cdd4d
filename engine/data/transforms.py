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


Size = tuple[int, int]  # width and height in pixels


def resize_to_cover(image: Image.Image, size: Size, resampling: Image.Resampling) -> Image.Image:
    """Resizes so that one side is that of `size` and the other no shorter; that one is rounded down."""
    (width, height), (wide, high) = image.size, size
    covering = (wide, int(wide * height / width)) if wide * height >= high * width else (int(high * width / height), high)
    return image if covering == image.size else image.resize(covering, resampling)


def crop(image: Image.Image, left: int, top: int, size: Size) -> Image.Image:
    return image.crop((left, top, left + size[0], top + size[1]))


def crop_centre(image: Image.Image, size: Size) -> Image.Image:
    (width, height), (wide, high) = image.size, size
    return crop(image, round((width - wide) / 2.0), round((height - high) / 2.0), size)


def crop_randomly(image: Image.Image, size: Size, record: int, count: int) -> list[Image.Image]:
    """`count` uniformly placed crops, or one where every crop would be the same; a pure function of the record's number."""
    if image.size == size:
        return [image]
    (width, height), (wide, high) = image.size, size
    draws = torch.tensor([record * count + variant for variant in range(count)])
    seed = torch.tensor([_CROP_SEED])
    words = philox.draw_words(seed, draws, philox.IMAGE_VARIANT, 1)[:, 0]
    # Integer arithmetic, as in philox.choices: word 0 places the crop across, word 1 down.
    lefts = ((2 * (words[:, 0] >> 8) + 1) * (width - wide + 1)) >> 25
    tops = ((2 * (words[:, 1] >> 8) + 1) * (height - high + 1)) >> 25
    return [crop(image, int(left), int(top), size) for left, top in zip(lefts, tops, strict=True)]


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def crop_centre_to_ratio(image: Image.Image, size: Size) -> Image.Image:
    """The largest part around the centre with the ratio of `size`, with the Kandinsky script's corners: PIL rounds their halves
    to even, which may make a square a pixel wider or narrower than the shorter side."""
    (width, height), (wide, high) = image.size, size
    kept = min(width, height * wide / high), min(height, width * high / wide)
    left, top = ((side - part) / 2 for side, part in zip(image.size, kept, strict=True))
    right, bottom = ((side + part) / 2 for side, part in zip(image.size, kept, strict=True))
    return image.crop((left, top, right, bottom))


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
