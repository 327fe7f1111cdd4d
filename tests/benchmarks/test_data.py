"""An index of more records than shards are written for is opened and drawn from."""

import json
import sys

import benchmarks.data.__main__ as data


def test_a_large_index_is_simulated(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "BATCHES", 2)
    monkeypatch.setattr(sys, "argv", ["data", "--simulate", "1000000", "--json", str(tmp_path / "data.json")])
    assert data.main() == 0
    measured = json.loads((tmp_path / "data.json").read_text())
    assert (measured["records"], measured["shards"]) == (1_000_000, 977)
    assert measured["open_seconds"] < 5
    assert measured["samples_per_second_again"] > 0
    assert "first_batch_seconds" in capsys.readouterr().out
