"""Whole runs of the engine and of the recipe, with its flags and at its best, on the same configuration."""

import json
import subprocess

import pytest

from benchmarks.runs import recipe
from engine.catalogue import FAMILIES
from engine.config.command_line import to_toml
from engine.loop.trainer import train
from engine.models.encoder import open_encoding


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_goes_from_images_to_steps_for_every_family(family, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "WARM_UP", 1)
    config = recipe.configuration(recipe.tiny(family, tmp_path), tmp_path, steps=1)
    steps = []
    step = recipe.PlainTraining.step

    def counted(plain, record, timesteps, coefficients):
        assert record.keys() == open_encoding(config).record_spec.keys()
        steps.append(len(timesteps))
        step(plain, record, timesteps, coefficients)

    monkeypatch.setattr(recipe.PlainTraining, "step", counted)
    assert recipe.recipe_rate(config, best=False) > 0
    assert steps == [4, 4]


def test_sides_take_turns_and_go_on(tmp_path, monkeypatch, capsys):
    calls = []

    def run_side(side, config, file):
        calls.append(side)
        if side == "best" and len(calls) < 4:
            raise RuntimeError("best ended with 1: CUDA out of memory")
        rate = {"recipe": 10.0, "best": 20.0, "engine": 40.0}[side]
        return {"samples_per_second": rate} | ({"encode_seconds": 1.5} if side == "engine" else {})

    monkeypatch.setattr(recipe, "run_side", run_side)
    command = ["recipe", "--tiny", "sd", "--rounds", "2", "--steps", "10", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr("sys.argv", command)
    assert recipe.main() == 0
    assert calls == ["recipe", "best", "engine"] * 2
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert recipe.ratios(rows, "recipe") == [4.0, 4.0]
    assert recipe.ratios(rows, "best") == [2.0]
    assert "| sd | 4 | 10 | 20 | 40 | 4.00 (4.00 to 4.00) | 2.00 (2.00 to 2.00) | 1.5 |" in capsys.readouterr().out
    assert recipe.main() == 0
    assert len(calls) == 6


@pytest.mark.parametrize(("device", "folder"), [("CPU, AMD EPYC, 1 threads", "cpu"), ("NVIDIA H100 PCIe", "h100-pcie")])
def test_results_lie_under_the_name_of_their_device(device, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "RESULTS", tmp_path)
    monkeypatch.setattr(recipe, "measure_all", lambda *arguments: [])
    monkeypatch.setattr(recipe, "environment", lambda: {"device": device})
    monkeypatch.setattr("sys.argv", ["recipe"])
    assert recipe.main() == 0
    assert (tmp_path / folder / "recipe.json").exists()


def test_one_configuration_runs_on_both_sides(tmp_path, monkeypatch, capsys):
    config = recipe.configuration(recipe.tiny("kandinsky-prior", tmp_path), tmp_path, steps=10)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    monkeypatch.setattr("sys.argv", ["recipe", "--side", "best", "--config", str(file)])
    assert recipe.main() == 0
    assert float(capsys.readouterr().out.split()[-1]) > 0
    assert train(config) == 0
    measured = recipe.engine_rate(config)
    assert measured["samples_per_second"] > 0
    assert measured["encode_seconds"] > 0


def test_a_side_that_fails_says_why(tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([], 2, "", "a warning\nengine.run: error: nowhere: no such folder\n")
    monkeypatch.setattr(recipe.subprocess, "run", lambda *arguments, **named: ended)
    config = recipe.configuration(recipe.tiny("kandinsky-prior", tmp_path), tmp_path, steps=10)
    with pytest.raises(RuntimeError, match=r"engine ended with 2: engine.run: error: nowhere"):
        recipe.run_side("engine", config, tmp_path / "run.toml")
