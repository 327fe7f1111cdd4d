"""Plans, growth and commands that build together, of few rows and images."""

import json
import sys

from benchmarks.data import building


def test_what_building_costs_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(building, "rates", lambda directory, count: [])
    output = tmp_path / "building.json"
    monkeypatch.setattr(sys, "argv", ["building", "--rows", "3000000", "--json", str(output)])
    assert building.main() == 0
    measured = json.loads(output.read_text())
    assert [row["rows"] for row in measured["plans"]] == [3000, 3_000_000]
    assert measured["plans"][1]["seconds"] < 20
    assert measured["plans"][1]["mib"] < 200
    assert measured["grown"]["encoded_bytes_for_one_more"] <= measured["grown"]["bytes_of_a_shard"]
    assert "3,000,000 rows  planned" in capsys.readouterr().out
