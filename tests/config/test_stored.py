"""Configurations that were stored: config.toml of a run, and the index of shards."""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import threading
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import tomli_w

from engine import checkpoint
from engine.config.command_line import Parser, load, number, parse, read_toml, to_toml
from engine.config.options import TrainConfig
from engine.config.schema import PLACES, SECRETS
from engine.errors import UserError, exit_code
from engine.loop.weights import zero_options
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


@pytest.mark.parametrize(("values", "named"), STORED_MISTAKES[:2])
def test_a_mistake_in_the_configuration_of_shards_names_their_index(values, named, shards, model, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "shards")
    index = tmp_path / "shards" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"config": values}))
    arguments = [tmp_path / "shards", "--pretrained_model_name_or_path", model]
    assert f"engine: error: {index}: {named}" in said(info_command, arguments, capsys)


@pytest.mark.parametrize("content", [b'{"format_version": ', b"\xff", b"[1]"])
def test_an_index_that_is_none_is_named(content, tmp_path, capsys):
    index = tmp_path / "index.json"
    index.write_bytes(content)
    assert f"engine: error: {index}: cannot be read: " in said(info_command, [tmp_path], capsys)


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


ANYTHING = [
    "true", "-1", "0.5", "9" * 400, "9" * 5000, "1e400", "nan", "-inf", '""', '"x"', '"\\u0000"', '"\\u001b[31m"', '"nan"',
    f'"{"x" * 10_000}"', f'"{"x/" * 5_000}"', "[]", "[[]]", '["a", "\\u0000"]', "{}", "{ a = 1 }", "[{ a = [1] }]",
    "2020-01-01", "2020-01-01T00:00:00Z", "10:00:00", "[" * 300 + "]" * 300, '"~nobody-here/x"',
]  # fmt: skip


def test_any_value_of_any_option_is_one_line_or_accepted(tmp_path):
    """Whatever a configuration holds, one line for each option that it is wrong for; seeded, a third of all pairs."""
    file, refused = tmp_path / "config.toml", 0
    pairs = list(itertools.product(TrainConfig.model_fields, ANYTHING))
    for name, value in random.Random(15).sample(pairs, len(pairs) // 3):
        others = "".join(f"{other} = {json.dumps(text)}\n" for other, text in STORED.items() if other != name)
        file.write_text(f"{others}{name} = {value}\n")
        lines: list[str] = []
        try:
            config = load(TrainConfig, read_toml(TrainConfig, file, str(file)), str(file))
        except UserError as error:
            lines = error.lines
        else:
            assert not (isinstance(number := getattr(config, name), float) and not math.isfinite(number)), (name, value)
        refused += len(lines)
        assert len(lines) <= 1, lines
        assert not re.search(r"[\x00-\x1f]", "".join(lines))
        assert len("".join(lines)) < 1500
    assert refused > len(pairs) // 5


@pytest.mark.parametrize(
    "content", ["x = " + "[" * 100_000, "a" + ".a" * 5000 + " = 1", "x = 1_" + "0" * 5000, "\0", "[a]\n[a]"]
)
def test_what_is_no_toml_is_a_line(content, tmp_path):
    (tmp_path / "config.toml").write_text(content)
    with pytest.raises(UserError) as error:
        read_toml(TrainConfig, tmp_path / "config.toml", "here")
    assert len(error.value.lines) == 1


def test_a_configuration_may_come_from_a_pipe_and_one_within_a_folder_may_not(data, tmp_path):
    pipe = tmp_path / "config.toml"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="here: not a regular file; give the path of a TOML file"):
        read_toml(TrainConfig, pipe, "here")
    writing = threading.Thread(target=pipe.write_text, args=('family = "sd"\npretrained_model_name_or_path = "org/model"\n',))
    writing.start()
    config = parse(TrainConfig, "", "", ["--config", str(pipe), *data[:2], "--output_dir", str(tmp_path / "out")])
    writing.join()
    assert config.pretrained_model_name_or_path == "org/model"
    with pytest.raises(UserError, match="too large for a configuration"):
        parse(TrainConfig, "", "", ["--config", "/dev/zero"])


NUMBERS = [name for name, field in TrainConfig.model_fields.items() if float in (field.annotation, *get_args(field.annotation))]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "Infinity"])
def test_no_option_takes_what_is_no_number(value, data):
    assert {"learning_rate", "adam_weight_decay", "step_timeout"} <= set(NUMBERS)
    with pytest.raises(UserError) as error:
        run(*data, *(f"--{name}={value}" for name in NUMBERS))
    assert len(error.value.lines) == len(NUMBERS)
    parser = Parser()
    parser.add_argument("--x", type=number(0))
    with pytest.raises(UserError, match="argument --x: must be at least 0, not"):
        parser.parse_args([f"--x={value}"])


@pytest.mark.parametrize(
    "content", ["hub_token = ['{}']", "hub_token = {{ a = '{}' }}", "hub_token = [['{}']]", "hub_token = '{}\\u0000'",
                "hub_tokn = '{}'", "hub_token = '{}"]
)  # fmt: skip
def test_a_token_is_never_said(content, data, tmp_path):
    (tmp_path / "run.toml").write_text(content.replace("'", '"').format("hf_secret"))
    with pytest.raises(UserError) as error:
        run(*data, "--config", str(tmp_path / "run.toml"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("arguments", [["--hub-token", "hf_secret"], ["--hub_tokenhf_secret"], ["hf_secret"],
                                       ["--push_to_hub", "hf_secret"], ["--push_to_hub=hf_secret"],
                                       ["--hub_token", "a", "hf_secret"], ["--hub_token", "hf_secret\0"]], ids=str)  # fmt: skip
def test_a_token_on_the_command_line_is_never_said(arguments, data):
    with pytest.raises(UserError) as error:
        run(*data, *arguments)
    assert "secret" not in str(error.value)
    assert "secret" not in repr(TrainConfig(family="sd", pretrained_model_name_or_path="x", hub_token="secret"))


def test_what_is_passed_over_in_a_file_is_said(data, tmp_path, capsys):
    (tmp_path / "run.toml").write_text("global_batch_size = 64\ngradient_accumulation_steps = 4\n")
    assert run(*data, "--config", str(tmp_path / "run.toml")).gradient_accumulation_steps == 1
    assert "run.toml: gradient_accumulation_steps is passed over; it follows from global_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/elsewhere", "..", "logs/../../x"])
def test_logs_stay_in_the_output_directory(place, data):
    with pytest.raises(UserError, match=r"--logging_dir .* leads out of the output directory; name a folder in it, .* logs"):
        run(*data, "--logging_dir", place)
    stored = STORED | {"logging_dir": place}
    assert load(TrainConfig, stored).logging_dir == place, "an export reads what earlier runs were given"


def test_where_an_earlier_run_kept_its_logs_is_passed_over_and_said(data, tmp_path, capsys):
    file = tmp_path / "config.toml"
    file.write_text(f'logging_dir = "{tmp_path / "elsewhere"}"\n')
    assert run(*data, "--config", str(file)).logging_dir == "logs"
    assert f"logging_dir {tmp_path / 'elsewhere'} is passed over, because it leads out of the" in capsys.readouterr().err
    assert run(*data, "--config", str(file), "--logging_dir", "mine").logging_dir == "mine"
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--logging_dir /x: leads out of the output directory"):
        run(*data, "--config", str(file), "--logging_dir", "/x")


def test_a_file_of_deepspeed_that_is_none_is_a_line(tmp_path):
    generator, file = random.Random(15), tmp_path / "deepspeed.json"
    values = [None, True, -1, 0.5, "x", [], [1], {}, {"a": {"b": 1}}, "auto"]
    config = TrainConfig(family="sd", pretrained_model_name_or_path="x", deepspeed_config=str(file))
    names = sorted({*zero_options._decided(config), "steps_per_print", "zero_optimization", "bf16", "timers.throughput", "x"})
    for _ in range(300):
        value: object = generator.choice(values)
        for part in reversed(generator.choice(names).split(".")):
            value = {part: value}
        file.write_text(json.dumps(value))
        with contextlib.suppress(UserError):
            zero_options.deepspeed_config(config, elements=4, overlap=False)
    for text in ("[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', "[]", "", "\0"):
        file.write_text(text)
        with pytest.raises(UserError, match="--deepspeed_config"):
            zero_options.read_file(config)
