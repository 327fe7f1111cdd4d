"""Several data sets in one run: by repeats, by weight, of shards alone, and what is read back of them."""

import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.config.command_line import load, read_toml
from engine.config.options import TrainConfig
from engine.data.format.index import Index
from engine.errors import UserError
from engine.loop.prepare import prepare_shards
from engine.loop.trainer import train
from engine.models.family import open_family
from engine.processes import Processes
from engine.shards import build_command
from tests import tiny
from tests.loop.runs import checkpoint_tensors, config
from tests.loop.test_families import losses


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Another image folder, of four images."""
    return tiny.write_images(tmp_path_factory.mktemp("few") / "few", count=4)


def mixture(model, shards, output, *tables, **options) -> TrainConfig:
    values = config(model, Path("x"), shards, output, **options).model_dump(exclude_unset=True)
    del values["train_data_dir"]
    return load(TrainConfig, {**values, "shards_dir": str(shards), "data_sets": list(tables)})


def streams_of(config: TrainConfig):
    return prepare_shards(config, open_family(config), Processes(), lambda *shards: None, config.seed, 4)[0]


def test_two_data_sets_by_repeats_train_resume_and_are_written_back(model, images, few, tmp_path, capsys):
    tables = [
        {"name": "colours", "train_data_dir": str(images), "caption_prefix": "sks", "random_flip": False},
        {"name": "few", "train_data_dir": str(few), "repeats": 3},
    ]
    accumulated = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_noise_scale": True}
    run = mixture(model, tmp_path / "shards", tmp_path / "out", *tables, checkpointing_steps=4, **accumulated)
    assert train(run) == 0
    said = capsys.readouterr().err
    assert "noise scale   in what data sets and sizes differ is noise too, for a micro-batch is of one of them" in said
    assert "data sets     colours 12 (50.0% of samples), few 4 (50.0% of samples)" in said
    assert "24 an epoch, of 16 records (none refused)" in said
    assert Index.read(tmp_path / "shards" / "colours").identity["caption_prefix"] == "sks"
    assert "caption_prefix" not in Index.read(tmp_path / "shards" / "few").identity
    assert not Index.read(tmp_path / "shards" / "colours").identity["preprocessing"]["random_flip"]
    written = tmp_path / "out" / "config.toml"
    assert tomllib.loads(written.read_text())["data"] == tables
    again = read_toml(TrainConfig, written, "") | {
        "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-4"),
    }  # fmt: skip
    assert train(load(TrainConfig, again)) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "out")[4:]


def test_by_weight_one_of_them_as_shards_alone(model, images, few, shards, tmp_path):
    tables = [
        {"name": "few", "train_data_dir": str(few), "weight": 0.75},
        {"name": "alone", "shards_dir": str(shards), "weight": 0.25},
    ]
    run = mixture(model, tmp_path / "shards", tmp_path / "out", *tables)
    assert train(run) == 0
    assert not (tmp_path / "shards" / "alone").exists()
    streams = streams_of(run)
    assert [(stream.data_set, stream.records, stream.share) for stream in streams.streams] == [("few", 4, 12), ("alone", 12, 4)]
    # The same data with its source there are the same shards, and so the same weights.
    tables[1]["train_data_dir"] = str(images)
    assert train(mixture(model, tmp_path / "shards", tmp_path / "with", *tables)) == 0
    alone, source = (checkpoint_tensors(tmp_path / name / "checkpoint-8", "weight") for name in ("out", "with"))
    assert all(alone[name].equal(source[name]) for name in alone | source)


def test_a_data_set_with_masks_beside_one_without(model, images, few, tmp_path, recorded):
    masked = Path(shutil.copytree(few, tmp_path / "masked"))
    for number, image in enumerate(sorted(masked.glob("*.png"))):
        (masked / f"{image.stem}.txt").write_text("a square")
        Image.new("L", (16, 16), 60 * number).save(masked / f"{image.stem}-mask.png")
    (masked / "metadata.jsonl").unlink()
    tables = [{"train_data_dir": str(images)}, {"train_data_dir": str(masked), "mask_column": "mask", "repeats": 3}]
    options = {"cache_text": "tokens", "max_train_steps": 12, "checkpointing_steps": 12}
    for name, how in (("eager", "off"), ("captured", "on")):
        assert train(mixture(model, tmp_path / "shards", tmp_path / name, *tables, cuda_graphs=how, **options)) == 0
    assert len(recorded) == 2, "a graph for each"
    assert losses(tmp_path / "captured") == losses(tmp_path / "eager")
    eager, captured = (checkpoint_tensors(tmp_path / name / "checkpoint-12", "weight") for name in ("eager", "captured"))
    assert all(torch.equal(eager[name], captured[name]) for name in eager | captured)
    fields = [Index.read(tmp_path / "shards" / name).fields for name in ("train", "masked")]
    assert ["mask" in of for of in fields] == [False, True]
    # Shards alone: the table still says that they hold masks.
    alone = [{"shards_dir": str(tmp_path / "shards" / name)} for name in ("train", "masked")]
    with pytest.raises(UserError, match="masked/index.json: .*--mask_column mask, now None"):
        streams_of(mixture(model, tmp_path, tmp_path / "out", *alone, cache_text="tokens"))
    alone[1]["mask_column"] = "mask"
    assert [stream.records for stream in streams_of(mixture(model, tmp_path, tmp_path / "out", *alone, **options)).streams] == [
        12,
        4,
    ]


def test_one_table_trains_what_the_options_train(model, images, shards, tmp_path):
    assert train(config(model, images, shards, tmp_path / "plain")) == 0
    table = {"train_data_dir": str(images), "shards_dir": str(shards)}
    assert train(mixture(model, tmp_path / "none", tmp_path / "table", table)) == 0
    assert losses(tmp_path / "table") == losses(tmp_path / "plain")


def test_shards_of_all_tables_are_built_by_a_command(model, images, few, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(f"""
family = "sd"
pretrained_model_name_or_path = "{model}"
resolution = 16
learning_rate = 1e-3

[[data]]
train_data_dir = "{images}"

[[data]]
train_data_dir = "{few}"
repeats = 2

[[data]]
name = "there"
shards_dir = "{tmp_path / "elsewhere"}"
""")
    assert build_command(["--config", str(file), "--shards_dir", str(tmp_path / "shards")]) == 0
    assert [Index.read(tmp_path / "shards" / name).records for name in ("train", "few")] == [12, 4]
    assert capsys.readouterr().out.count("fingerprint") == 2


def test_several_folders_are_data_sets(model, images, few, tmp_path):
    values = config(model, images, tmp_path, tmp_path / "out").model_dump(exclude_unset=True)
    run = load(TrainConfig, values | {"train_data_dir": [str(images), str(few)]})
    assert [(stream.data_set, stream.records) for stream in streams_of(run).streams] == [("train", 12), ("few", 4)]
