"""Plans, growth and commands that build together, of few rows and images."""

import json
import sys

from benchmarks.data import building


def test_what_building_costs_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(building, "rates", lambda directory, count: {"rates": []})
    output = tmp_path / "building.json"
    monkeypatch.setattr(sys, "argv", ["building", "--rows", "3000000", "--json", str(output)])
    assert building.main() == 0
    small, large, growth, _ = json.loads(output.read_text())["rows"]
    assert (small["rows"], large["rows"]) == (3000, 3_000_000)
    assert large["seconds"] < 20
    assert large["mib"] < 200
    assert growth["encoded_bytes_for_one_more"] <= growth["bytes_of_a_shard"]
    said = capsys.readouterr().out
    assert "3,000,000 rows  planned" in said
    monkeypatch.setattr(building, "plan", lambda *arguments: 1 / 0)
    assert building.main() == 0, "what is there is not measured again"
    assert capsys.readouterr().out == said
