"""Curves of losses beside each other: what differs, and what is noise."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.steps import curves


def test_curves_are_judged_by_the_noise_of_the_first(tmp_path):
    generator = np.random.default_rng(0)
    base = (1 + 0.1 * generator.standard_normal(200)).tolist()

    def row(side, losses):
        return {"name": side, "checkpoint": "sd", "side": side, "device": "CPU", "losses": losses}

    near, far = ([value + shift for value in base] for shift in (0.001, 0.1))
    rows = [row("fp32", base), row("near", near), row("far", far), row("wrong", [float("nan")] * 200)]
    verdicts = {verdict["side"]: verdict for verdict in curves.verdicts(rows)}
    assert verdicts["near"]["within_noise"]
    assert verdicts["near"]["difference"] == pytest.approx(0.001)
    assert not verdicts["far"]["within_noise"]
    assert verdicts["wrong"]["failed"] == "a loss is not finite"
    assert "fp32" not in verdicts
    assert "| sd | near |  | fp32 |" in curves.table(rows)
    curves.chart(rows, tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
