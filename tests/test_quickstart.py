"""The pieces of the quickstart that can go wrong quietly; the whole of it is `make quickstart`."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from examples import quickstart_lora


@pytest.fixture(scope="module")
def quickstart():
    path = Path(__file__).parents[1] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_captions_are_tokenised_into_words(quickstart, tmp_path):
    tokenizer = quickstart.build_tokenizer(tmp_path / "tokenizer")
    for digit in range(10):
        words = tokenizer.tokenize(quickstart.caption(digit))
        assert words == ["a</w>", "handwritten</w>", f"{quickstart.WORDS[digit]}</w>"]


def test_the_image_folder_holds_every_digit(quickstart, tmp_path):
    quickstart.write_images(tmp_path / "images")
    rows = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 1797
    assert rows[7]["text"] == quickstart.caption(int(load_digits().target[7]))
    assert Image.open(tmp_path / "images" / rows[7]["file_name"]).size == (32, 32)


def test_the_classifier_knows_real_digits_and_rejects_others(quickstart):
    digits = load_digits()
    real = [
        [Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
         for i in np.flatnonzero(digits.target == digit)[:10]]
        for digit in range(10)
    ]  # fmt: skip
    assert quickstart.recognised(real) > 0.95
    assert quickstart.recognised(real[1:] + real[:1]) < 0.05


def test_the_images_of_the_lora_are_the_digits_inverted(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart_lora.quickstart, "ROOT", tmp_path)
    quickstart_lora.quickstart.write_images(tmp_path / "images")
    quickstart_lora.write_images(tmp_path / "inverted")
    lines = (tmp_path / "inverted" / "metadata.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()[: quickstart_lora.IMAGES]
    name = json.loads(lines[7])["file_name"]
    before, after = (np.asarray(Image.open(tmp_path / folder / name).convert("RGB")) for folder in ("images", "inverted"))
    assert (after == 255 - before).all()


def test_a_changed_base_is_noticed(tmp_path):
    file = tmp_path / "unet" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    before = quickstart_lora.digests(tmp_path)
    assert list(before) == ["unet/model.safetensors"]
    file.write_bytes(b"others")
    assert quickstart_lora.digests(tmp_path) != before
    (tmp_path / "model_index.json").write_text("{}")
    assert list(quickstart_lora.digests(tmp_path)) == ["model_index.json", "unet/model.safetensors"]
