"""Configurations that were stored: config.toml of a run, and the index of shards."""

import importlib.util
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w

from engine import checkpoint
from engine.config.command_line import load, parse, to_toml
from engine.config.options import TrainConfig
from engine.config.schema import PLACES, SECRETS
from engine.errors import UserError, exit_code
from engine.shards import info_command
from tests.config.arguments import run


def test_the_stored_configuration_of_a_divided_batch_is_read_back(data, tmp_path):
    """The run has set the accumulation, which cannot be given beside the whole batch."""
    config = run(*data, "--global_batch_size", "64", "--output_dir", str(tmp_path))
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config.model_copy(update={"gradient_accumulation_steps": 2})))
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]) == config


def test_the_stored_configuration_is_read_back_and_keeps_no_secret(data, tmp_path):
    config = run(
        *data,
        "--hub_token",
        "very-secret",
        "--validation_prompts",
        'quo"te\nof two lines',
        "--seed",
        "9",
        "--output_dir",
        str(tmp_path),
    )
    text = to_toml(config)
    assert "very-secret" not in text
    assert {"hub_token"} == SECRETS
    file = tmp_path / "config.toml"
    file.write_text(text)
    again = parse(TrainConfig, "engine.run", "", ["--config", str(file)])
    assert again == config.model_copy(update={"hub_token": None})


def test_a_file_that_also_holds_what_follows_from_the_whole_batch_is_read(data, tmp_path):
    config = run(*data, "--global_batch_size", "64", "--output_dir", str(tmp_path))
    file = tmp_path / "config.toml"
    file.write_text(f"{to_toml(config)}gradient_accumulation_steps = 4\n")
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]) == config


STORED = {"family": "sd", "pretrained_model_name_or_path": "org/model", "shards_dir": "shards"}
# A stored configuration that is wrong -> what is said of it.
STORED_MISTAKES = [
    (STORED | {"resolution": "wide"}, "--resolution 'wide': input should be a valid integer"),
    (STORED | {"resolutoin": 3}, "unknown option resolutoin; did you mean resolution?"),
    (STORED | {"family": "flux"}, "--family 'flux': input should be 'sd', 'kandinsky-prior', 'kandinsky-decoder' or"),
    (STORED | {"family": ["sd"]}, "--family ['sd']: input should be 'sd'"),
    (STORED | {"family": "wuerstchen"}, "--pretrained_model_name_or_path is not used by wuerstchen; leave it out"),
    ({"family": "sd", "shards_dir": "shards"}, "--pretrained_model_name_or_path is required"),
    ({"shards_dir": "shards"}, "--family is required"),
]


def said(command, arguments: list, capsys) -> str:
    """The one line that a command says of a mistake."""
    assert exit_code("engine", lambda: command(list(map(str, arguments)))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("content", "named"),
    [
        *((tomli_w.dumps(values).encode(), named) for values, named in STORED_MISTAKES),
        (tomli_w.dumps(STORED | {"offload_ema": True}).encode(), "--offload_ema needs --use_ema"),
        (b"resolution = ", "not valid TOML"),
        (b"# \xff", "not valid TOML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_mistake_in_the_configuration_of_a_checkpoint_names_its_file(content, named, tmp_path, capsys):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "manifest.json").write_text("{}")
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    arguments = [tmp_path / "checkpoint-4", "--output_dir", tmp_path / "pipeline"]
    assert f"engine: error: {file}: {named}" in said(checkpoint.export_command, arguments, capsys)


@pytest.mark.parametrize(("values", "named"), STORED_MISTAKES)
def test_a_mistake_in_the_configuration_of_shards_names_their_index(values, named, shards, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "shards")
    index = tmp_path / "shards" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"config": values}))
    assert f"engine: error: {index}: {named}" in said(info_command, [tmp_path / "shards"], capsys)


@pytest.mark.parametrize("content", [b'{"format_version": ', b"\xff", b"[1]"])
def test_an_index_that_is_none_is_named(content, tmp_path, capsys):
    index = tmp_path / "index.json"
    index.write_bytes(content)
    assert f"engine: error: {index}: not a readable index" in said(info_command, [tmp_path], capsys)


def test_a_configuration_is_read_where_its_data_and_packages_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    values = STORED | {"train_data_dir": "/nowhere", "pretrained_model_name_or_path": "/nowhere", "use_8bit_adam": True}
    assert load(TrainConfig, values).use_8bit_adam
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    with pytest.raises(UserError, match="--train_data_dir /nowhere: no such directory"):
        parse(TrainConfig, "engine.run", "", ["--config", str(tmp_path / "run.toml")])


def test_the_stored_configuration_means_the_same_in_another_directory(tmp_path, monkeypatch):
    for name in ("here/images", "here/model", "there"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here" / "model" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    config = parse(TrainConfig, "", "", [
        "--family", "sd", "--pretrained_model_name_or_path", "model", "--train_data_dir", "images", "--output_dir", "../out",
        "--cache_dir", "cache", "--logging_dir", "logs",
    ])  # fmt: skip
    (tmp_path / "config.toml").write_text(to_toml(config))
    monkeypatch.chdir(tmp_path / "there")
    again = parse(TrainConfig, "", "", ["--config", str(tmp_path / "config.toml")])
    assert Path(again.pretrained_model_name_or_path) == tmp_path / "here" / "model"
    assert Path(again.train_data_dir) == tmp_path / "here" / "images"
    assert Path(again.output_dir).resolve() == tmp_path / "out"
    assert Path(again.cache_dir) == tmp_path / "here" / "cache"
    assert again.logging_dir == "logs"


def test_names_on_the_hub_are_stored_as_they_are(data, tmp_path):
    config = run("--dataset_name", "org/data", "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest")
    values = tomllib.loads(to_toml(config))
    assert values["pretrained_model_name_or_path"] == "org/model"
    assert values["dataset_name"] == "org/data"
    assert values["resume_from_checkpoint"] == "latest"


def test_a_place_in_the_home_directory_is_found(data, monkeypatch):
    monkeypatch.setenv("HOME", data[1])
    assert run(*data, "--output_dir=~/out").output_dir == f"{data[1]}/out"


def test_every_option_that_names_a_place_is_known():
    inside = {"logging_dir"}  # the output directory
    names = {name for name in TrainConfig.model_fields if name.endswith(("_dir", "_path", "_config"))}
    assert names - PLACES == inside
    assert TrainConfig.model_fields.keys() >= PLACES
