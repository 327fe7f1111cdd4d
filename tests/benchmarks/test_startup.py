"""Phases are told apart, and the model of the start follows what was counted."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.runs import startup

KEPT = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"


def test_a_phase_is_what_it_does_without_those_inside(tmp_path, monkeypatch):
    counts = {"opened": 0}
    monkeypatch.setattr(startup, "counted", lambda: dict(counts))
    phases = startup.Phases(time.time() - 5, tmp_path / "note")
    counts["opened"] = 7
    phases.begin()
    with phases.busy("Opening"):
        counts["opened"] += 1
        with phases.busy(startup.LAST):
            counts["opened"] += 2
    note = json.loads((tmp_path / "note").read_text())["phases"]
    assert {what: phase["opened"] for what, phase in note.items()} == {
        startup.IMPORTS: 7, startup.BETWEEN: 0, "Opening": 1, startup.LAST: 2,
    }  # fmt: skip
    assert note[startup.IMPORTS]["seconds"] > 4.9


def test_a_phase_takes_what_its_slowest_resource_does():
    figures = startup.Figures()
    assert startup.phase_seconds(figures, 8, same=5e9) == pytest.approx(1)  # the node's share
    assert startup.phase_seconds(figures, 1024, same=5e9) == pytest.approx(6.4)  # the file system's
    assert startup.phase_seconds(figures, 1024, opened=100) == pytest.approx(1024 * 100 / figures.metadata)
    assert startup.phase_seconds(figures, 1024, opened=100, once=True) == pytest.approx(100 * figures.latency)


def test_the_model_follows_what_was_counted():
    files = {"before": "startup_before.json", "now": "startup.json"}
    rows = {of: json.loads((KEPT / file).read_text())["measured"] for of, file in files.items()}
    assert "| Interpreter and imports |" in startup.measured_table(rows["now"])
    kinds = {of: [startup.modelled(rows[of], of == "before", world, startup.Figures()) for world in startup.CLUSTERS]
             for of in files}  # fmt: skip
    for before, now in zip(*kinds.values(), strict=True):
        assert before["checkpoint compared and read"] > now["checkpoint compared and read"]
        images = "only with --train_data_dir: images looked at"
        assert before[images] > now[images], "every process looked at each, and at its file twice"
    assert "| in all |" in startup.modelled_table(kinds)
