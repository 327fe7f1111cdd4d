"""The optimizer's step, one side at a time, and only where it steps."""

import gc
import weakref

import pytest
import torch

from benchmarks.operations import optimizer
from benchmarks.tools import timing
from benchmarks.tools.rows import Rows

CPU = torch.device("cpu")


def test_the_optimizer_is_measured_one_side_at_a_time(monkeypatch):
    alive = []

    def watched(build):
        def built(parameters, device):
            gc.collect()
            assert not [state for state in alive if state() is not None]
            step, state = build(parameters, device)
            alive.extend(weakref.ref(tensor) for tensor in state)
            return step, state

        return built

    monkeypatch.setattr(optimizer, "SIDES", {side: watched(build) for side, build in optimizer.SIDES.items()})
    row = optimizer.measure(1000, False, CPU)
    assert row["gain"].keys() == {"passes"}
    assert len(alive) == 4


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_an_optimizer_that_skips_its_steps_is_not_measured(scale, monkeypatch):
    monkeypatch.setattr(optimizer, "SCALE", scale)
    monkeypatch.setattr(timing, "REPEATS", 1)
    row = optimizer.measure(1000, False, CPU, Rows(None, optimizer.__doc__))
    assert row["failed"].startswith("ValueError: a step was skipped")
    assert "a step was skipped" in optimizer.table([row])
