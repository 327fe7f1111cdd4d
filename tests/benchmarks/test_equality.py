"""Captured against uncaptured runs: what is not equal is a failure."""

import torch

from benchmarks.steps import equality
from benchmarks.tools.rows import Rows


def test_runs_that_are_not_equal_failed(monkeypatch):
    def run(options, output):
        weights = {"weight": torch.full((2,), 1.5 if options["cuda_graphs"] == "off" else 1.0)}
        return {"curve": [(1.0, 1.0)], "weights": weights, "step_milliseconds": 1.0}

    monkeypatch.setattr(equality, "run", run)
    row = Rows(None, "What?").measure("sd", 1, lambda: equality.compare("sd", {}, 1))
    assert row["failed"] == "not equal in exported weights only, weights by up to 0.5"
    assert "| sd | not equal in exported weights only" in equality.table([row])
