"""Shards with consistent digests that say what is not so: whoever writes them writes the index too."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine import shards as command
from engine.data.format.index import INDEX
from engine.data.format.shard import Shards, shard_name
from engine.errors import UserError, exit_code
from engine.files import digest
from engine.tensors import read_header
from tests.data.test_reader import SIDES


def say_of(directory: Path, name: str, tensors: dict | None = None, metadata: dict | None = None) -> None:
    """Writes a shard with other tensors or metadata, and the index accordingly."""
    path = directory / name
    tensors = safetensors.torch.load_file(path) | (tensors or {})
    metadata = read_header(path)[1] | (metadata or {})
    safetensors.torch.save_file(tensors, path, {"engine": json.dumps(metadata)})
    edit(directory, lambda index: next(e for e in index["shards"] if e["file"] == name).update(
        bytes=path.stat().st_size, sha256=digest(path)))  # fmt: skip


def edit(directory: Path, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def rows_of(directory: Path) -> list[torch.Tensor]:
    """What records hold, in order, every variant of them."""
    reader = Shards(directory)
    rows = [reader.rows_of(torch.arange(len(reader)), variants=variant) for variant in range(2)]
    gathered = []
    for numbers in rows:
        for name, field in reader.fields.items():
            gathered.append(torch.empty(len(reader), *field.shape, dtype=field.dtype))
            reader.gather(name, numbers[field.per], gathered[-1])
    return gathered


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return shutil.copytree(shards, tmp_path / "shards")


def refused(directory: Path, monkeypatch, capsys) -> str:
    """The one line that opening, verifying and describing them gives."""
    with pytest.raises(UserError) as error:
        Shards(directory)
    assert len(error.value.lines) == 1
    monkeypatch.setattr(sys, "argv", ["program", "verify", str(directory)])
    assert exit_code("program", command.main) == 2
    assert capsys.readouterr().err == f"program: error: {error.value}\n"
    return str(error.value)


FARTHEST = [2**63 - 1, -(2**63)]


@pytest.mark.parametrize(
    ("name", "place", "values", "named"),
    [
        ("image_offsets", 0, [1, -1, *FARTHEST], "image_offsets does not lead from 0 to 10"),
        ("image_offsets", 2, [2, 6, 5, 3, *FARTHEST], "(image_offsets does not lead|an image has not 2 or 8 rows)"),
        ("image_offsets", -1, [9, 11, *FARTHEST], "image_offsets does not lead from 0 to 10"),
        ("caption_offsets", 3, [2, 4, -1, *FARTHEST], "caption_offsets does not lead from 0 to 5"),
        ("caption_offsets", -1, [4, 6, *FARTHEST], "caption_offsets does not lead from 0 to 5"),
        ("caption_numbers", 1, [-1, 4, *FARTHEST], "caption_numbers points beyond the 4 that there are"),
        ("source", 4, [8, 12, *FARTHEST], "source (does not increase|points beyond the 12)"),
        ("source", 0, [4, -1], "source (does not go on|points beyond)"),
    ],
)
def test_what_a_record_points_to_is_there(name, place, values, named, copy, monkeypatch, capsys):
    whole = safetensors.torch.load_file(copy / shard_name(1))[name]
    for value in values:
        tensor = whole.clone()
        tensor[place] = value
        say_of(copy, shard_name(1), {name: tensor})
        with pytest.raises(UserError, match=f"{shard_name(1)}: .*{named}"):
            Shards(copy)
    assert shard_name(1) in refused(copy, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        ({"source": torch.arange(5, 10, dtype=torch.int32)}, {}, "source is I32"),
        ({"source": torch.arange(5, 9)}, {}, r"source is I64 \[4\], not torch.int64 \[5\]"),
        ({"caption_numbers": torch.zeros(5, 1, dtype=torch.int64)}, {}, r"caption_numbers is I64 \[5, 1\]"),
        ({"caption_offsets": torch.zeros(0, dtype=torch.int64)}, {}, r"caption_offsets is I64 \[0\]"),
        ({"latent_mean": torch.zeros(9, 4, 8, 8)}, {}, r"latent_mean is F32 \[9, 4, 8, 8\]"),
        ({"latent_std": torch.zeros(10, 4, 8, 8, dtype=torch.float16)}, {}, "latent_std is F16"),
        ({"other": torch.zeros(1)}, {}, "other is no tensor of these shards"),
        ({}, {"records": 4}, r"not torch.int64 \[[45]\]"),
        ({}, {"image_rows": True}, "image_rows: Input should be a valid integer"),
        ({}, {"captions": ["one"]}, "1 captions for"),
        ({}, {"captions": [3]}, "captions.0: Input should be a valid string"),
        ({}, {"fingerprint": "0" * 64}, "fingerprint is 000"),
        ({}, {"refused": [{"source": "a"}]}, "a refused sample has a source and a reason"),
    ],
)
def test_a_shard_holds_what_its_header_and_the_index_say(tensors, metadata, named, copy, monkeypatch, capsys):
    say_of(copy, shard_name(1), tensors, metadata)
    line = refused(copy, monkeypatch, capsys)
    assert shard_name(1) in line
    with pytest.raises(UserError, match=named):
        Shards(copy)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("file", "../shard-00000.safetensors", "shards.0.file"),
        ("file", "/etc/passwd", "shards.0.file"),
        ("file", "..", "shards.0.file: not the name of a file"),
        ("file", "a\n\x1b[2Jb", "shards.0.file"),
        ("file", "a" * 5000, "shards.0.file"),
        ("file", shard_name(1), "a shard is listed twice"),
        ("records", -1, "shards.0.records"),
        ("records", 4, "records is 12, those of the shards are 11"),
        ("records", 2**70, "shards.0.records"),
        ("image_rows", 10.0, "shards.0.image_rows"),
        ("sha256", "0" * 63, "shards.0.sha256"),
        ("bytes", None, "shards.0.bytes"),
        ("more", 1, "shards.0.more"),
    ],
)
def test_the_index_is_checked_before_any_shard_is_opened(key, value, named, copy):
    edit(copy, lambda index: index["shards"][0].update({key: value}))
    with pytest.raises(UserError, match=named) as error:
        Shards(copy)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fields": {}}, "no field belongs to images"),
        ({"refused_count": 1}, "refused_count is 1, listed are 0"),
        ({"encode_seconds": -1.0}, "encode_seconds"),
        ({"family": ["sd"]}, "family"),
        ({"identity": {"models": 3}}, "identity: source, models and preprocessing are objects"),
        ({"identity": {}}, "the fingerprint is not that of the identity"),
        ({"fields": {"x": {"shape": [2**40, 2**40], "dtype": "float32", "per": "image"}}}, "larger than any"),
        ({"fields": {"x": {"shape": [1], "dtype": "load", "per": "image"}}}, "no dtype of shards: load"),
        ({"fields": {"source": {"shape": [1], "dtype": "int64", "per": "image"}}}, "the name of another tensor"),
        ({"format_version": True}, "format_version"),
    ],
)
def test_an_index_agrees_with_itself(change, named, copy):
    edit(copy, lambda index: index.update(change))
    with pytest.raises(UserError, match=named):
        Shards(copy)


def test_bytes_changed_anywhere_are_one_line_or_change_nothing(shards, copy):
    """Of the index, and of a shard before its rows begin."""
    draw, whole, lines = random.Random(5), rows_of(shards), []
    for number in range(120):
        name = INDEX if number % 2 else shard_name(number % 3)
        before = (copy / name).read_bytes()
        altered = bytearray(before)
        altered[draw.randrange(len(before) if number % 2 else read_header(copy / name)[2])] = draw.randrange(256)
        (copy / name).write_bytes(altered)
        try:
            assert all(map(torch.equal, rows_of(copy), whole))
        except UserError as error:
            lines.append(error.lines)
        (copy / name).write_bytes(before)
    assert len(lines) > 90
    assert {len(said) for said in lines} == {1}


@pytest.mark.parametrize("gather", SIDES)
@pytest.mark.parametrize("offset", [-1, *FARTHEST])
def test_the_readers_refuse_an_offset_that_no_file_has(gather, offset, shards):
    with (shards / shard_name(0)).open("rb") as file:
        files = torch.tensor([file.fileno()] * 2, dtype=torch.int32).numpy()
        with pytest.raises(OSError, match=r".") as error:
            gather(files, torch.tensor([0, offset]).numpy(), 8, torch.empty(2, 8, dtype=torch.uint8))
    assert error.value.filename == 1


def test_a_shard_that_a_stranger_left_is_built_again(shards, copy, model, images):
    """Its fingerprint is right, and nothing else."""
    say_of(copy, shard_name(1), metadata={"records": "5", "captions": 3})
    (copy / INDEX).unlink()
    arguments = [
        "--family", "sd", "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images),
        "--resolution", "16", "--random_flip", "--shard_records", "5", "--shards_dir", str(copy),
    ]  # fmt: skip
    assert command.build_command(arguments) == 0
    assert all((copy / shard_name(n)).read_bytes() == (shards / shard_name(n)).read_bytes() for n in range(3))


def info(directory: Path, monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["program", "info", str(directory), *options])
    return exit_code("program", command.main)


def test_info_opens_no_model_that_an_index_names(copy, tmp_path, monkeypatch, capsys):
    named = {"pretrained_model_name_or_path": "/evil", "original_config": "/evil.yaml", "cache_dir": "/evil", "variant": "evil"}
    edit(copy, lambda index: index["config"].update(named))
    monkeypatch.setattr("engine.models.encoder.open_encoding", lambda config: pytest.fail("opened"))
    assert info(copy, monkeypatch) == 0
    assert "contact sheet  give the models to draw it with: --pretrained_model_name_or_path" in capsys.readouterr().out
    given = []
    monkeypatch.setattr("engine.models.encoder.open_encoding", lambda config: given.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        info(copy, monkeypatch, "--pretrained_model_name_or_path", str(tmp_path))
    (config,) = given
    assert config.pretrained_model_name_or_path == str(tmp_path)
    assert (config.original_config, config.cache_dir, config.variant) == (None, None, None)
    assert config.resolution == 16


def test_models_that_did_not_build_the_shards_draw_none(copy, model, tmp_path, monkeypatch, capsys):
    edit(copy, lambda index: index["config"].update(mixed_precision="bf16"))
    assert info(copy, monkeypatch, "--pretrained_model_name_or_path", str(model)) == 2
    assert "the shards hold other records than these models make" in capsys.readouterr().err


def test_info_prints_no_escapes(copy, monkeypatch, capsys):
    text = "\x1b[2Jred\u202e\n"
    say_of(copy, shard_name(0), metadata={"captions": [text] * 4})
    edit(copy, lambda index: index.update(refused=[{"source": text, "reason": text}], refused_count=1))
    edit(copy, lambda index: index["config"].update(train_data_dir=text))
    for options in (), ("--record", "1"):
        assert info(copy, monkeypatch, *options) == 0
        output = capsys.readouterr().out
        assert "\\x1b[2Jred\\u202e\\n" in output
        assert "\x1b" not in output
        assert "\u202e" not in output


@pytest.mark.parametrize("named", [{"train_data_dir": "/"}, {"train_data_dir": None, "dataset_name": "nobody/nothing"}])
def test_info_opens_no_data_set_that_an_index_names(named, copy, images, monkeypatch, capsys):
    edit(copy, lambda index: index["config"].update(named, cache_dir="/evil"))
    monkeypatch.setattr("engine.data.describe.open_source", lambda *arguments: pytest.fail("opened"))
    for options in (), ("--cache_dir", "/tmp"), ("--dataset_config_name", "x"):
        assert info(copy, monkeypatch, "--record", "1", *options) == 0
        output = capsys.readouterr().out
        assert "sample         1 of the data set\n" in output
        assert "file           give the data set to name it: --train_data_dir or --dataset_name\n" in output
    monkeypatch.undo()
    for option in ("--dataset_name", "--train_data_dir"):
        assert info(copy, monkeypatch, "--record", "1", option, str(images)) == 0
        assert f"file           001.png of {images}\n" in capsys.readouterr().out
