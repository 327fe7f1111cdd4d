"""The model of scaling follows its formulas."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.runs import scaling
from benchmarks.tools.cost import payload


def test_the_model_of_scaling_follows_its_formulas(tmp_path):
    hardware = scaling.Hardware()
    # Within a node the ring moves (n - 1) / n of the bytes over NVLink; doubling the nodes cannot make it faster.
    assert scaling.collective_seconds(1e9, 8, hardware) == pytest.approx(7 / 8 * 1e9 / 450e9, rel=0.02)
    across = [scaling.collective_seconds(1e9, gpus, hardware) for gpus in (16, 32, 64, 1024)]
    assert across == sorted(across)
    assert payload(1, 100) == payload(2, 100) == {"reduced": 200, "gathered": 200}
    assert payload(3, 100) == {"reduced": 200, "gathered": 400}
    assert scaling.state_bytes(100, 3, 4) == 100 * 20 / 4
    assert scaling.state_bytes(100, 1, 4) == 100 * (2 + 2 + 16 / 4)
    between, beside = (scaling.checkpoint_interval(10**9, 64, way, hardware) for way in (False, True))
    assert beside[0] < between[0]
    assert beside[1] < between[1] < 0.01
    rows = scaling.measure_all(hardware)
    assert all(0.02 < row["efficiency"] <= 1.02 for row in rows)
    scaling.chart(rows, tmp_path / "scaling.png")
    assert np.asarray(Image.open(tmp_path / "scaling.png").convert("L")).std() > 5
    assert "| Kandinsky 2.2 prior, 128 | 3 |" in scaling.table(rows, hardware)


def test_the_model_of_scaling_weighs_overlap_against_the_hosts_launches():
    hardware, row = scaling.Hardware(), {"parameters": 10**9, "tensors": 500, "modules": 10, "forward_flops": 10**12}
    # An all-reduce is a reduce-scatter and a gathering.
    reduced, gathered = scaling.communication_seconds(row, 1, 8, 20, hardware)
    assert reduced == pytest.approx(2 * gathered)
    assert scaling.communication_seconds(row, 3, 8, 20, hardware) == pytest.approx((gathered, 2 * gathered), rel=0.1)
    # Every module that stage 3 gathers costs a latency, and every process its Python.
    many = row | {"modules": 300}
    assert scaling.communication_seconds(many, 3, 8, 20, hardware)[1] > 2 * gathered + 580 * 3 * hardware.nvlink_latency
    waiting = [scaling.step_seconds(row, 32, 3, gpus, hardware)["waiting"] for gpus in (64, 1024)]
    assert waiting[1] - waiting[0] == pytest.approx(960 * 500 * scaling.STAGE_3_HOST, rel=0.2)
    parts = scaling.step_seconds(row, 32, 1, 8, hardware)
    assert parts["hidden"] == pytest.approx(reduced * 19 / 20)
    captured, overlapped = (scaling.total_seconds(parts, way) for way in (True, False))
    assert captured - overlapped == pytest.approx(parts["hidden"] - parts["waiting"])
    assert scaling.chosen_seconds(parts, 1) == min(captured, overlapped)
    assert scaling.chosen_seconds(parts, 3) == overlapped
    slow = scaling.step_seconds(row, 32, 1, 64, scaling.Hardware(network=1e9))
    assert scaling.total_seconds(slow, captured=False) < scaling.total_seconds(slow, captured=True)
    choices = scaling.choices_table(scaling.measure_choices(hardware))
    assert choices.count("**") == 2 * len(scaling.FAMILIES) * len(scaling.BATCHES) * len(scaling.CHOICES)
