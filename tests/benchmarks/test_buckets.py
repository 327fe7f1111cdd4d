"""What buckets spare photographs, drawn, and what they cost, on few images and steps."""

import json
import sys

import numpy as np
from PIL import Image

from benchmarks.data import buckets


def test_photographs_are_compared_and_drawn(tmp_path, monkeypatch):
    picture, result = tmp_path / "photographs.png", tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["buckets", "--no-cost", "--picture", str(picture), "--json", str(result)])
    assert buckets.main() == 0
    found = json.loads(result.read_text())
    assert len(found["photographs"]) == 14
    assert all(row["bucket"] <= row["square"] for row in found["photographs"])
    assert found["mean"]["bucket"] < found["mean"]["square"] / 3
    assert picture.stat().st_size < 300_000
    assert np.asarray(Image.open(picture).convert("L")).std() > 10


def test_encoding_and_training_are_timed(tmp_path, monkeypatch):
    for name, value in {"COPIES": 1, "TURNS": 0, "STEPS": 2, "WARM": 0}.items():
        monkeypatch.setattr(buckets, name, value)
    options = buckets.options_of(tmp_path)
    found = buckets.rates(options | {"bucket_step": 16}, tmp_path, buckets=True)
    assert found["encode"] > 0
    assert found["train"] > 0
    assert 0 < found["pixels"] <= 32 * 32
