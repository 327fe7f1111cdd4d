"""Ways to cut group normalisation's work, tried where there is a GPU."""

import pytest
import torch

from benchmarks.operations import tilings
from engine.errors import UserError
from engine.kernels import group_norm_silu


def test_a_way_is_tried_in_its_constants_and_they_are_put_back(monkeypatch):
    before = [getattr(tilings.kernels, name) for name in tilings.NAMES]
    seen = []

    def timed(sides, device):
        seen.append([getattr(tilings.kernels, name) for name in tilings.NAMES])
        assert {len(works) for works in sides.values()} == {tilings.CALLS}
        return {side: [3.0, 1.0, 2.0] for side in sides}, {}

    monkeypatch.setattr(tilings, "microseconds", timed)
    monkeypatch.setattr(tilings, "sides", lambda shape, device: {"forward": None, "copy forward": None})
    assert tilings.measure((2, 64, 4, 4), tilings.TILINGS[2], torch.device("cpu")) == {"forward": 2.0, "copy forward": 2.0}
    assert seen == [list(tilings.TILINGS[2])]
    assert before == [getattr(tilings.kernels, name) for name in tilings.NAMES]
    assert tilings.kernels.group_norm_silu is group_norm_silu


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tilings"])
    with pytest.raises(UserError, match="no GPU"):
        tilings.main()
