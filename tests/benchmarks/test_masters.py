"""Weights with and without masters, over a few steps of the smallest model."""

import sys

from benchmarks.steps import masters


def test_those_without_masters_follow_where_they_are_rounded_by_chance(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(masters, "MARKS", 4)
    monkeypatch.setattr(masters, "OPTIMIZERS", {"adamw": 1e-4})
    monkeypatch.setattr(sys, "argv", ["masters", "--steps", "8", "--picture", str(tmp_path / "curves.png")])
    assert masters.main() == 0
    names, _, values = capsys.readouterr().out.strip().splitlines()
    row = dict(zip(names.split(" | "), values.split(" | "), strict=True))
    assert abs(float(row["bf16, stochastic: way"]) - 1) < 0.1
    assert float(row["bf16, nearest: way |"].rstrip(" |")) < 0.6
    assert (tmp_path / "curves.png").is_file()
