"""The command lines beside training: shards verified and shown, samples drawn."""

import runpy
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from engine import sample
from engine import shards as command
from engine.data.format.shard import shard_name
from engine.errors import UserError, exit_code


def main(monkeypatch, module, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    return exit_code("program", module.main)


def test_verify_finds_whole_shards_whole(shards, capsys, monkeypatch):
    assert main(monkeypatch, command, "verify", str(shards)) == 0
    assert "3 of 3 shards are whole" in capsys.readouterr().out


def test_verify_names_a_damaged_shard_and_leaves_with_1(shards, tmp_path, capsys, monkeypatch):
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / shard_name(1)).write_bytes(b"short")
    assert main(monkeypatch, command, "verify", str(tmp_path / "shards")) == 1
    output = capsys.readouterr().out
    assert f"{shard_name(1)}: 5 bytes instead of" in output
    assert "2 of 3 shards are whole" in output


def test_info_describes_and_draws(shards, tmp_path, capsys, monkeypatch):
    sheet = tmp_path / "sheet.png"
    assert main(monkeypatch, command, "info", str(shards), "--output", str(sheet), "--records", "6") == 0
    output = capsys.readouterr().out
    for line in ("records        12", "image rows     24", "captions       4 distinct", "refused        0", f"{sheet}"):
        assert line in output
    assert np.asarray(Image.open(sheet)).std() > 10


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["mend"], "unknown command 'mend'"),
        (["verify", "/nowhere"], "/nowhere: no index.json there"),
        (["info"], "the following arguments are required: directory"),
        (["build", "--family", "sd"], "--pretrained_model_name_or_path is required"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, named, capsys, monkeypatch):
    assert main(monkeypatch, command, *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_without_a_command_the_usage_is_printed(capsys, monkeypatch):
    assert main(monkeypatch, command) == 0
    assert "build|verify|info" in capsys.readouterr().out


def test_the_former_name_of_the_command_still_answers(shards, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["engine.cache", "verify", str(shards)])
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("engine.cache", run_name="__main__")
    assert leave.value.code == 0
    assert "3 of 3 shards are whole" in capsys.readouterr().out


def test_samples_are_drawn_into_a_labelled_grid(model, tmp_path, monkeypatch):
    grid = tmp_path / "grid.png"
    arguments = ["--model", str(model), "--prompts", "a red square", "a very long prompt " * 20, "--output", str(grid)]
    assert main(monkeypatch, sample, *arguments, "--num_inference_steps", "2", "--images_per_prompt", "2") == 0
    assert Image.open(grid).width > 2 * 64


def test_a_model_that_is_none_is_named(tmp_path, capsys, monkeypatch):
    assert main(monkeypatch, sample, "--model", str(tmp_path), "--prompts", "x") == 2
    assert "no model_index.json there" in capsys.readouterr().err


def test_user_errors_are_printed_once_per_node(monkeypatch, capsys):
    def fail() -> int:
        raise UserError("no")

    monkeypatch.setenv("LOCAL_RANK", "3")
    assert exit_code("program", fail) == 2
    assert capsys.readouterr().err == ""


def test_an_error_of_one_process_alone_is_printed_by_it(monkeypatch, capsys):
    def fail() -> int:
        raise UserError("this disk", alone=True)

    monkeypatch.setenv("LOCAL_RANK", "3")
    assert exit_code("program", fail) == 2
    assert capsys.readouterr().err == "program: error: this disk\n"
