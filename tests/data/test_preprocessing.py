"""Every family's preprocessing, to the last bit of the float what its script does, on photographs of every kind.

The scripts read images through `datasets` and convert them to RGB; then `sd` and `wuerstchen` use torchvision's transforms,
Kandinsky PIL and the image processor of the checkpoint.
"""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from engine.config.options import CacheConfig
from engine.data.sources.decode import decode
from engine.models.encoder import open_encoding
from examples.photographs import photographs as load_photographs
from tests import torchvision_reference

KINDS = [
    "landscape", "portrait", "square", "tiny", "palette", "palette-transparent", "grey", "grey-alpha", "cmyk", "16-bit",
    "alpha", "bilevel", *(f"exif-{orientation}" for orientation in range(1, 9)),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Photographs in files of every kind, most with odd sides."""
    directory = tmp_path_factory.mktemp("kinds")
    loaded = load_photographs()
    cat, temple = loaded["a cat"].resize((301, 203)), loaded["a temple"].resize((211, 307))
    alpha = Image.fromarray(np.linspace(0, 255, cat.width * cat.height).reshape(cat.height, cat.width).astype(np.uint8))
    transparent = cat.quantize(64)
    transparent.info["transparency"] = bytes(range(0, 256, 4))
    deep = (np.asarray(cat.convert("L")).astype(np.uint16) * 257)[:, :250]
    images = {
        "landscape": (cat, "png", {}), "portrait": (temple, "jpg", {}), "square": (cat.resize((129, 129)), "webp", {}),
        "tiny": (cat.resize((37, 23)), "png", {}), "palette": (cat.quantize(32), "gif", {}),
        "palette-transparent": (transparent, "png", {}), "grey": (temple.convert("L"), "png", {}),
        "grey-alpha": (Image.merge("LA", [cat.convert("L"), alpha]), "png", {}), "cmyk": (temple.convert("CMYK"), "jpg", {}),
        "16-bit": (Image.fromarray(deep), "png", {}), "alpha": (Image.merge("RGBA", [*cat.split(), alpha]), "png", {}),
        "bilevel": (temple.convert("1"), "png", {}),
    }  # fmt: skip
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        images[f"exif-{orientation}"] = (cat, "jpg", {"exif": exif})
    paths = {}
    for kind, (image, suffix, options) in images.items():
        paths[kind] = directory / f"{kind}.{suffix}"
        image.save(paths[kind], **options)
    return paths


@pytest.fixture(scope="module")
def read_by_the_script(files) -> dict[str, Image.Image]:
    feature = datasets.Image()
    return {kind: feature.decode_example({"path": str(path), "bytes": None}).convert("RGB") for kind, path in files.items()}


@pytest.fixture(scope="module")
def transformed_by_torchvision(read_by_the_script, tmp_path_factory) -> dict[str, torch.Tensor]:
    if not torchvision_reference.available():
        pytest.skip("torchvision is not installed (the Makefile puts it aside)")
    directory = tmp_path_factory.mktemp("torchvision")
    (directory / "images").mkdir()
    for kind, image in read_by_the_script.items():
        image.save(directory / "images" / f"{kind}.png")
    torchvision_reference.run(directory)
    return load_file(directory / "results.safetensors")


def test_the_photographs_are_of_every_kind(files):
    modes = {Image.open(path).mode for path in files.values()}
    assert {"RGB", "RGBA", "P", "L", "LA", "CMYK", "1"} <= modes
    assert any(mode.startswith("I") for mode in modes)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_as_the_scripts_read_them(kind, files, read_by_the_script):
    assert np.array_equal(np.asarray(decode(files[kind])), np.asarray(read_by_the_script[kind]))


@pytest.mark.parametrize("size", torchvision_reference.SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_sd(kind, size, files, transformed_by_torchvision, model):
    encoding = open_encoding(
        CacheConfig(family="sd", pretrained_model_name_or_path=str(model), resolution=size, center_crop=True)
    )
    (prepared,) = encoding.prepare(decode(files[kind]), 0)
    assert torch.equal(prepared["pixels"], transformed_by_torchvision[f"sd/{kind}/{size}"])


@pytest.mark.parametrize("kind", KINDS)
def test_wuerstchen(kind, files, transformed_by_torchvision, published):
    encoding = open_encoding(CacheConfig(family="wuerstchen", **published("wuerstchen"), resolution=128))
    (prepared,) = encoding.prepare(decode(files[kind]), 0)
    assert torch.equal(prepared["pixels"], transformed_by_torchvision[f"wuerstchen/{kind}/128"])


def clip_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """What CLIP's preprocessing comes to, written out: short side, centre, scale, normalise."""
    (width, height), short = image.size, min(image.size)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    pixels = np.asarray(image)[top : top + size, left : left + size].astype(np.float64) / 255
    normalised = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(normalised.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["kandinsky-prior", "kandinsky-decoder"])
def test_kandinsky_for_clip(name, kind, files, read_by_the_script, published):
    models = published(name)
    encoding = open_encoding(CacheConfig(family=name, **models, resolution=64))
    image = read_by_the_script[kind]
    script = CLIPImageProcessorPil.from_pretrained(models["pretrained_prior_model_name_or_path"], subfolder="image_processor")
    (prepared,) = encoding.prepare(decode(files[kind]), 0)
    found = prepared["pixels" if name == "kandinsky-prior" else "clip_pixels"]
    assert torch.equal(found, script([image, image], return_tensors="pt").pixel_values[1])
    torch.testing.assert_close(found.double(), clip_pixels(image, 32), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_kandinsky_decoder_for_movq(kind, files, read_by_the_script, published):
    encoding = open_encoding(CacheConfig(family="kandinsky-decoder", **published("kandinsky-decoder"), resolution=64))
    image = read_by_the_script[kind]
    (width, height), side = image.size, min(image.size)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    square = image.crop(box).resize((64, 64), resample=Image.BICUBIC, reducing_gap=1)
    expected = torch.from_numpy(np.transpose(np.array(square).astype(np.float32) / 127.5 - 1, [2, 0, 1]))
    (prepared,) = encoding.prepare(decode(files[kind]), 0)
    assert torch.equal(prepared["pixels"], expected)
