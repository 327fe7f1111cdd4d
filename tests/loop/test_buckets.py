"""Training on images of several ratios: every family, gone on with from a checkpoint, from shards alone, by two processes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.config.command_line import load
from engine.config.options import TrainConfig
from engine.data.format.buckets import Buckets, read_indexes
from engine.data.format.index import BUCKETS
from engine.errors import UserError
from engine.loop.trainer import train
from tests.commands import run_two
from tests.loop.runs import checkpoint_tensors, command
from tests.loop.test_families import losses

SIZES = {"sd": (16, 4), "kandinsky-decoder": (16, 4), "wuerstchen": (256, 128)}  # resolution and step
SHAPES = [(32, 32), (48, 32), (48, 32), (32, 48), (32, 32), (48, 32), (96, 32)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of four ratios, one of which has a single image, each with a caption and a mask beside it."""
    directory = tmp_path_factory.mktemp("ratios")
    for number, size in enumerate(SHAPES):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
        Image.fromarray(pixels[..., 0]).save(directory / f"{number}-mask.png")
        (directory / f"{number}.txt").write_text(f"of {number}")
    return directory


def run(family: str, published, data: Path, output: Path, **options) -> TrainConfig:
    resolution, step = SIZES[family]
    values = {
        "family": family, **published(family), "train_data_dir": str(data), "output_dir": str(output), "buckets": True,
        "resolution": resolution, "bucket_step": step, "shard_records": 2, "train_batch_size": 2, "max_train_steps": 6,
        "seed": 3, "log_every": 1, "report_to": "none", "checkpointing_steps": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    return load(TrainConfig, values | options)


@pytest.mark.parametrize("family", SIZES)
def test_every_family_trains_and_goes_on_as_if_undisturbed(family, published, data, tmp_path, capsys):
    masks = {"mask_column": "mask"}
    assert train(run(family, published, data, tmp_path / "out", **masks)) == 0
    indexes = read_indexes(tmp_path / "out" / "shards")
    assert len(indexes) == (2 if family == "wuerstchen" else 4)  # whose steps are wide
    assert sum(index.records for index in indexes.values()) == 7
    said = capsys.readouterr().err
    assert all(f"{bucket} ({index.records})" in said for bucket, index in indexes.items())
    whole = losses(tmp_path / "out")
    assert len(whole) == 6
    assert np.isfinite(whole).all()
    resumed = run(
        family, published, data, tmp_path / "again", **masks, shards_dir=str(tmp_path / "out" / "shards"),
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"),
    )  # fmt: skip
    assert train(resumed) == 0
    assert losses(tmp_path / "again") == whole[3:]
    weights, again = (checkpoint_tensors(tmp_path / name / "checkpoint-6", "weight") for name in ("out", "again"))
    assert weights.keys() == again.keys()
    assert all(weights[name].equal(again[name]) for name in weights)


def test_shards_of_buckets_alone_train_the_same(published, data, tmp_path):
    first = run("sd", published, data, tmp_path / "out")
    assert train(first) == 0
    alone = {"train_data_dir": None, "buckets": False, "bucket_step": 64, "shards_dir": str(tmp_path / "out" / "shards")}
    assert train(run("sd", published, data, tmp_path / "alone", **alone)) == 0
    assert losses(tmp_path / "alone") == losses(tmp_path / "out")
    with pytest.raises(UserError, match="the shards there were built with --buckets; give that too"):
        train(run("sd", published, data, tmp_path / "square", **alone | {"train_data_dir": str(data)}))
    names = [bucket.name for bucket in Buckets.read(tmp_path / "out" / "shards" / BUCKETS).buckets]
    assert names == ["12x20", "16x16", "20x12", "24x8"]


@pytest.mark.two_processes
def test_two_processes_train_as_one(published, data, tmp_path):
    assert train(run("sd", published, data, tmp_path / "one", gradient_accumulation_steps=2)) == 0
    two = run("sd", published, data, tmp_path / "two", shards_dir=str(tmp_path / "one" / "shards"))
    run_two([*command(two, sys.executable, "-m", "engine.run")])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
