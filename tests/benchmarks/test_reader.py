"""The reader's three ways of gathering rows, timed on a small file."""

import json
import sys

import pytest

from benchmarks.data import reader
from engine.data.format.gather import best_gather, gather_in_cpp


@pytest.mark.skipif(best_gather() is not gather_in_cpp, reason="needs a compiler")
def test_the_reader_is_timed_beside_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reader, "FILE_BYTES", 2**20)
    monkeypatch.setattr(reader, "REPEATS", 2)
    monkeypatch.setattr(sys, "argv", ["reader", "--json", str(tmp_path / "rows.json")])
    assert reader.main() == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [name for name, _, _ in reader.SHAPES]
    assert all(min(row["microseconds"].values()) > 0 for row in rows)
    assert "memmap" in capsys.readouterr().out
