"""What a round of the held-out loss costs, on the smallest model."""

import sys

from benchmarks.steps import held_out


def test_a_round_is_timed_against_steps(monkeypatch, capsys):
    monkeypatch.setattr(held_out, "WARM_UP", 1)
    arguments = ["--checkpoints", "kandinsky-prior", "--records", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["held_out", *arguments])
    assert held_out.main() == 0
    assert "| kandinsky-prior |" in capsys.readouterr().out
