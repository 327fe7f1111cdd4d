"""The shards measured beside other formats, of which none is installed here; and an index of more records than are written."""

import json
import sys

import benchmarks.data.__main__ as data
from benchmarks.tools import simulated


def test_a_large_index_is_simulated(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(simulated, "BATCHES", 2)
    kept = {"environments": [], "rows": [{"name": "sd, 1 records", "environment": 0}]}
    (tmp_path / "data.json").write_text(json.dumps(kept))
    monkeypatch.setattr(sys, "argv", ["data", "--simulate", "1000000", "--json", str(tmp_path / "data.json")])
    assert data.main() == 0
    comparison, measured = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert comparison == kept["rows"][0]
    assert (measured["records"], measured["shards"]) == (1_000_000, 977)
    assert measured["open_seconds"] < 5
    assert measured["samples_per_second_again"] > 0
    assert "first_batch_seconds" in capsys.readouterr().out


def test_sides_are_measured_in_turns(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "RECORDS", {"prior": 64})
    monkeypatch.setattr(data, "SIZES", [4, 8])
    monkeypatch.setattr(data, "WINDOW_SECONDS", 0.02)
    arguments = ["--rounds", "1", "--sides", "engine, blocks", "--records", "64", "--json", str(tmp_path / "data.json")]
    monkeypatch.setattr(sys, "argv", ["data", *arguments])
    assert data.main() == 0
    (row,) = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert {"open_seconds", "resume_seconds", "memory_mib", "warm_4", "cold_8"} < row["sides"]["engine, blocks"].keys()
    assert "| engine, blocks | " in capsys.readouterr().out


def test_the_better_number_of_workers_stands_in_every_figure():
    said = {0: [{"open_seconds": 1.0, "warm_16": 10.0}, {"open_seconds": 3.0, "warm_16": 10.0}],
            2: [{"open_seconds": 4.0, "warm_16": 30.0}]}  # fmt: skip
    assert data.best(said) == {"open_seconds": 2.0, "warm_16": 30.0, "workers": {"open_seconds": 0, "warm_16": 2}}
