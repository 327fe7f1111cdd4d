"""Image preprocessing, to the pixel what torchvision does on PIL images."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import transforms

LANCZOS = Image.Resampling.LANCZOS


def picture(width: int, height: int) -> Image.Image:
    """Every pixel tells its place: red counts columns, green rows."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns % 256, rows % 256, 0 * rows], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (64, 32)), ((50, 100), (32, 64)), ((99, 50), (63, 32)), ((40, 40), (32, 32))]
)
def test_the_short_side_is_met_and_the_long_one_rounded_down(size, expected):
    assert transforms.resize_to_cover(picture(*size), (32, 32), LANCZOS).size == expected


def test_an_image_of_the_right_size_is_left_alone():
    image = picture(32, 48)
    assert transforms.resize_to_cover(image, (32, 32), LANCZOS) is image


@pytest.mark.parametrize(("size", "corner"), [((40, 32), (4, 0)), ((32, 41), (0, 4)), ((35, 32), (2, 0)), ((33, 32), (0, 0))])
def test_the_centre_is_where_torchvision_puts_it(size, corner):
    # int(round((size - crop) / 2)), which rounds halves to even.
    cropped = np.asarray(transforms.crop_centre(picture(*size), (32, 32)))
    assert cropped.shape == (32, 32, 3)
    assert tuple(cropped[0, 0, :2]) == corner


def test_random_crops_lie_inside_repeat_and_spread():
    image = picture(64, 32)
    lefts = set()
    for record in range(40):
        crops = transforms.crop_randomly(image, (32, 32), record, 4)
        again = transforms.crop_randomly(image, (32, 32), record, 4)
        assert len(crops) == 4
        for crop, same in zip(crops, again, strict=True):
            pixels = np.asarray(crop)
            assert np.array_equal(pixels, np.asarray(same))
            assert pixels.shape == (32, 32, 3)
            assert np.array_equal(np.diff(pixels[0, :, 0].astype(int)), np.ones(31))
            lefts.add(int(pixels[0, 0, 0]))
    assert {0, 32} <= lefts
    assert len(lefts) > 25


def test_a_square_image_has_one_crop():
    image = picture(32, 32)
    assert transforms.crop_randomly(image, (32, 32), 0, 4) == [image]


def test_pixels_become_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 127, 255]]], np.uint8))
    tensor = transforms.to_tensor(image)
    assert tensor.shape == (3, 1, 1)
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))


def test_mirroring_swaps_left_and_right():
    assert np.array_equal(np.asarray(transforms.mirror(picture(5, 3))), np.asarray(picture(5, 3))[:, ::-1])


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [
        ((100, 50), (48, 32), (64, 32)),
        ((50, 100), (48, 32), (48, 96)),
        ((30, 20), (48, 32), (48, 32)),
        ((99, 50), (32, 48), (95, 48)),
    ],
)
def test_an_oblong_is_covered_by_the_smallest_image(image, size, expected):
    assert transforms.resize_to_cover(picture(*image), size, LANCZOS).size == expected


def test_crops_of_an_oblong_lie_along_what_is_left():
    crops = [crop for record in range(20) for crop in transforms.crop_randomly(picture(64, 32), (48, 32), record, 4)]
    corners = [np.asarray(crop)[0, 0, :2].tolist() for crop in crops]
    assert {crop.size for crop in crops} == {(48, 32)}
    assert {top for _, top in corners} == {0}
    assert {0, 16} <= {left for left, _ in corners}
    assert tuple(np.asarray(transforms.crop_centre(picture(64, 32), (48, 32)))[0, 0, :2]) == (8, 0)


@pytest.mark.parametrize(
    ("size", "expected"), [((48, 32), (96, 64)), ((32, 48), (43, 64)), ((32, 32), (64, 64)), ((64, 16), (100, 25))]
)
def test_the_largest_part_of_a_ratio_is_around_the_centre(size, expected):
    part = transforms.crop_centre_to_ratio(picture(100, 64), size)
    assert part.size == pytest.approx(expected, abs=1)
    left, top = np.asarray(part)[0, 0, :2].tolist()
    assert (left, top) == pytest.approx(((100 - part.width) / 2, (64 - part.height) / 2), abs=1)
