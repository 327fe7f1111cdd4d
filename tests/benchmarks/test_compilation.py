"""Code that is compiled beforehand: a row finds it in the caches, and nothing that was compiled ran."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.steps import compilation
from benchmarks.tools import checkpoints, levers, settings, sides
from benchmarks.tools.rows import Rows
from engine.errors import TRY_AGAIN

CPU = torch.device("cpu")


class Small(nn.Module):
    """As little as makes a matrix product, a norm and dropout, in the place of a published model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(24), nn.Linear(24, 24)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.linear(self.norm(hidden)), 0.1, self.training)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """The Kandinsky prior with a model that compiles in seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    opened = checkpoints.open_checkpoint("kandinsky-prior", tmp_path, CPU)
    monkeypatch.setattr(checkpoints.Checkpoint, "load_model", lambda self, form=None, **options: Small().train())
    monkeypatch.setattr(type(opened.family), "predict", staticmethod(lambda model, noisy, timesteps, record: model(noisy)))
    yield opened
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["compiled and captured", "recipe at its best, cached"])
def test_a_row_finds_what_was_compiled(checkpoint, name):
    lever = next(lever for lever in levers.LEVERS if lever.name == name)
    assert compilation.compile_form(checkpoint, lever, 2) == {"compiled": 2, "found": 0}
    torch._dynamo.reset()
    counters.clear()
    with settings.settings_kept():
        side = sides.open_side(checkpoint, lever, 2)
        side.step()
        side.step()
    found, of_autograd = counters["inductor"], counters["aot_autograd"]
    assert (found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]) == (2, 0)
    assert (of_autograd["autograd_cache_hit"], of_autograd["autograd_cache_miss"]) == (1, 0)


def test_each_form_has_a_process_and_a_row(tmp_path, monkeypatch, capsys):
    started = []

    def run(command, env, timeout, **others):
        started.append(command[-1])
        if command[-1] == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        output = 'a line\n{"compiled": 2, "found": 0}\n'
        return SimpleNamespace(returncode=int(command[-1] == "bad"), stdout=output, stderr="first\nwhy\n")

    monkeypatch.setattr(compilation, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    kept = Rows(tmp_path / "rows.json", compilation.__doc__)
    works = {name: ("-c", name) for name in ("good", "bad", "slow")}
    rows = {row["name"]: row for row in compilation.side_by_side(kept, works, 2, 1.0)}
    assert rows.keys() == {"good", "bad"}
    assert (rows["good"]["compiled"], rows["good"]["found"], rows["bad"]["failed"]) == (2, 0, "RuntimeError: why")
    assert kept.exit_code == TRY_AGAIN
    started.clear()
    again = Rows(tmp_path / "rows.json", compilation.__doc__)
    compilation.side_by_side(again, works, 2, 1.0)
    assert set(started) == {"bad", "slow"}, "what is compiled stays so, what failed is tried again"
    assert again.exit_code == TRY_AGAIN
    del works["slow"]
    for exit_code, name in ((0, "bad"), (TRY_AGAIN, "worse")):  # the second attempt was the last; another's first is not
        works[name] = ("-c", "bad")
        last = Rows(tmp_path / "rows.json", compilation.__doc__)
        compilation.side_by_side(last, works, 2, 1.0)
        assert last.exit_code == exit_code
    works["bad"] = works["worse"] = ("-c", "mended")
    rows = {row["name"]: row for row in compilation.side_by_side(last, works, 2, 1.0)}
    assert not any("failed" in row for row in rows.values()), "what an attempt brings is kept"
    assert "| good |" in compilation.table(list(rows.values()))


def test_every_form_that_a_planned_row_compiles_is_compiled_once():
    works = compilation.forms(compilation.ORDER, [])
    assert works.keys() >= {
        "SD 1.5, 512 px: recipe at its best, cached", "SD 1.5, 512 px: compiled, plain norms",
        "Wuerstchen v2 prior, 768 px: fp8 matrix products", "Kandinsky 2.2 prior: compiled, torch's attention",
        "Kandinsky 2.2 decoder, 512 px: compiled and captured",
    }  # fmt: skip
    assert len(works) == 17
    assert not any("512 px: recipe at its best" in name and "decoder" in name for name in works)


def test_a_tiny_form_is_opened_in_this_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*compilation.command_of("kandinsky-prior", "compiled and captured")[1:]])
    assert compilation.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"compiled": 0, "found": 0}
