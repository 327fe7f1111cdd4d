"""How orders mix records is measured, theirs too."""

import json
import sys

import numpy as np
import pytest

from benchmarks.data import mixing


def test_orders_are_measured_side_by_side(monkeypatch, tmp_path, capsys):
    for name, value in {"SHARDS": 8, "SHARD": 64, "CLASSES": 4, "BATCH": 16, "NEAR": 64, "WINDOWS": [1, 4]}.items():
        monkeypatch.setattr(mixing, name, value)
    monkeypatch.setattr(sys, "argv", ["mixing", "--json", str(tmp_path / "mixing.json")])
    assert mixing.main() == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "mixing.json").read_text())["rows"]}
    assert rows["global"]["variance"] == pytest.approx(1, abs=0.2)
    assert rows["blocks, window 1"]["variance"] == pytest.approx(16, abs=0.5)
    assert rows["blocks, window 4"]["open_shards"] == 4 <= rows["py1e, block 4"]["open_shards"]
    assert "py1e, block 4" in capsys.readouterr().out


def test_what_is_compared_visits_every_record_once():
    assert np.array_equal(np.sort(mixing.py1e(16, 1)), np.arange(mixing.SHARDS * mixing.SHARD))
