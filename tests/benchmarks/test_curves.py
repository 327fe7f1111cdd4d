"""Curves of losses beside each other: what differs, and what is noise."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers.pipelines.wuerstchen import WuerstchenPrior
from PIL import Image

from benchmarks.steps import curves
from benchmarks.tools import published


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


def test_wuerstchens_random_weights_divide_by_nothing_near_zero(monkeypatch):
    prior = partial(WuerstchenPrior, c_in=4, c=64, c_cond=8, depth=1, nhead=4)
    name = "Wuerstchen v2 prior, 768 px"
    monkeypatch.setitem(published.CHECKPOINTS, name, ("wuerstchen", 768, {"prior": {"prior": prior}}))
    torch.manual_seed(0)
    model = published.trained_model(name)
    seen = []
    model.out.register_forward_hook(lambda module, inputs, output: seen.append(output.chunk(2, dim=1)[1]))
    with torch.no_grad():
        model(torch.randn(64, 4, 8, 8), torch.rand(64), torch.randn(64, 5, 8))
    assert float((1 - seen[0]).abs().min()) > 0.2
