"""What objectives cost a step, and what stratified timesteps spare the gradient, on the smallest model."""

import sys

import numpy as np
import torch
from PIL import Image

from benchmarks.steps import objectives, stratified

CPU = torch.device("cpu")


def test_an_objective_is_timed_against_a_step_without(monkeypatch, capsys):
    assert "pyramid noise" not in objectives.objectives_of("kandinsky-prior")
    assert "DREAM" not in objectives.objectives_of("wuerstchen")
    monkeypatch.setattr(objectives, "OBJECTIVES", {"Huber loss": objectives.OBJECTIVES["Huber loss"]})
    monkeypatch.setattr(sys, "argv", ["objectives", "--checkpoints", "kandinsky-prior", "--steps", "2"])
    assert objectives.main() == 0
    assert "| kandinsky-prior: Huber loss |" in capsys.readouterr().out


def test_strata_make_the_loss_vary_less(tmp_path):
    row = stratified.measure(8, "none", draws=20, trained=2, device=CPU)
    assert row["loss_ratio"] < 1
    rows = [{"name": "none, 8", "weighting": "none", "batch": 8} | row]
    assert "| none | 8 |" in stratified.table(rows)
    stratified.chart(rows, tmp_path / "ratios.png")
    assert np.asarray(Image.open(tmp_path / "ratios.png").convert("L")).std() > 5
