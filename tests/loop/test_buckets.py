"""Training on images of several ratios: every family, gone on with from a checkpoint, from shards alone, by two processes."""

import os
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
from tests.commands import ON_GPU
from tests.loop.runs import checkpoint_tensors
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
        "deterministic": ON_GPU,
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


def test_growth_that_opens_a_bucket_or_brings_a_data_set_is_refused_by_the_word_that_accepts_it(published, data, tmp_path):
    """From one bucket, of which a checkpoint knows no streams, to three of two data sets."""
    shapes = iter([(16, 48), (48, 16), (32, 32)])

    def add() -> None:
        name = str(len([*(tmp_path / "data").iterdir()]))
        Image.new("RGB", next(shapes), (9, 9, 9)).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"of {name}")

    (tmp_path / "data").mkdir()
    add()
    options = {"train_batch_size": 1, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    goes_on = {"continue_on_grown_data": True}

    def trained(steps: int, **more) -> int:
        return train(run("sd", published, tmp_path / "data", tmp_path / "out", **options | more, max_train_steps=steps))

    (tmp_path / "data" / "x.png").write_bytes(b"no image")  # in the bucket of the squares, which has no record
    (tmp_path / "data" / "x.txt").write_text("x")
    assert trained(1) == 0
    assert trained(2) == 0
    for steps, bucket in ((3, "24x8"), (4, "16x16")):
        add()
        with pytest.raises(UserError, match=rf"other data sets or buckets \({bucket} is new\).* --continue_on_grown_data"):
            trained(steps)
        with pytest.raises(UserError, match=r"was trained on other shards \(--random_flip False, now True\)"):
            trained(steps, random_flip=True, shards_dir=str(tmp_path / "others"), **goes_on)
        assert trained(steps, **goes_on) == 0
    tables = [{"name": "a", "train_data_dir": str(tmp_path / "data")}, {"name": "b", "train_data_dir": str(data)}]
    mixed = {"train_data_dir": None, "data_sets": tables, "shards_dir": str(tmp_path / "mixed")}
    with pytest.raises(UserError, match=r"other data sets or buckets \(a is new\).* --continue_on_grown_data"):
        trained(5, **mixed)
    assert not [*(tmp_path / "mixed").rglob("shard-*")]
    assert trained(5, **mixed, **goes_on) == 0


def test_a_fraction_of_which_nothing_is_held_out_is_refused(published, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("x")
    with pytest.raises(UserError, match=r"--validation_fraction 0.5: nothing is held out"):
        train(run("sd", published, tmp_path, tmp_path / "out", validation_fraction=0.5, train_batch_size=1))


def test_held_out_data_beside_shards_that_may_only_be_read_is_encoded_in_the_output_directory(
    published, data, tmp_path, monkeypatch
):
    shards = tmp_path / "shards"
    options = {"max_train_steps": 1, "shards_dir": str(shards)}
    assert train(run("sd", published, data, tmp_path / "first", **options)) == 0
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == shards and mode == os.W_OK) and access(path, mode))
    alone = {"train_data_dir": None, "buckets": False, "bucket_step": 64, "validation_data_dir": str(data)}
    assert train(run("sd", published, data, tmp_path / "out", **options | alone)) == 0
    assert not (shards / "validation").exists()
    assert (tmp_path / "out" / "shards" / "validation" / "index.json").exists()
