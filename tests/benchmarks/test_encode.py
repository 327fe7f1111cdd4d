"""The encoders of every family, timed on models of a few thousand weights."""

import json
import sys

from benchmarks.data import encode
from benchmarks.tools import published


def test_the_encode_benchmark_runs_on_tiny_models(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(encode, "REPEATS", 1)
    output = tmp_path / "encode.json"
    monkeypatch.setattr(sys, "argv", ["encode", "--tiny", "--images", "2", "--batch", "2", "--json", str(output)])
    assert encode.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["model"] for row in rows] == list(published.TINY)
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "wuerstchen" in capsys.readouterr().out
