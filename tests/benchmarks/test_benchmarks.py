"""The benchmarks run on a CPU, and count what is published."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import encode
from benchmarks.runs import full_size, scaling
from benchmarks.steps import overhead, sizes
from benchmarks.tools import cost, published
from benchmarks.tools.cost import payload
from benchmarks.tools.levers import EAGER

# Parameters in millions and training TFLOP per sample, as published configurations come to.
EXPECTED = {
    "SD 1.5, 512 px": (859.5, 2.41), "SD 2.1, 512 px": (865.9, 2.41), "Kandinsky 2.2 decoder, 512 px": (1253, 2.57),
    "Kandinsky 2.2 decoder, 768 px": (1253, 5.98), "Kandinsky 2.2 prior": (1026, 0.494),
    "Wuerstchen v2 prior, 768 px": (994, 3.46),
}  # fmt: skip


@pytest.mark.parametrize("checkpoint", EXPECTED)
def test_full_size_models_have_the_published_size(checkpoint):
    parameters, training = EXPECTED[checkpoint]
    row = cost.sizes_of(checkpoint)
    assert row["parameters"] / 1e6 == pytest.approx(parameters, rel=6e-4)
    assert 3 * row["forward_flops"] / 1e12 == pytest.approx(training, rel=2e-3)
    assert checkpoint in sizes.table([row], 788e12, 4.3e12)


def test_the_costs_are_counted():
    row = cost.sizes_of("Kandinsky 2.2 prior")
    # Two readings of the weights, the gradient, its copy to the flat buffer, the norm, and the optimizer's pass.
    assert row["constant_bytes"] == (2 + 2 + 2 + 4 + 2 + 36) * row["parameters"]
    # Per block and token, in widths of 2048: queries, keys and values 6, attention 4, its projection 2, the MLP 10.
    assert row["sample_bytes"] == pytest.approx(3 * 2 * 20 * 81 * 22 * 2048, rel=0.01)


def test_the_encode_benchmark_runs_on_tiny_models(monkeypatch, tmp_path, capsys):
    output = tmp_path / "encode.json"
    monkeypatch.setattr("sys.argv", ["encode", "--tiny", "--images", "2", "--batch", "2", "--json", str(output)])
    assert encode.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["model"] for row in rows] == list(published.TINY)
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "wuerstchen" in capsys.readouterr().out


def is_drawn(path: Path) -> bool:
    return np.asarray(Image.open(path).convert("L")).std() > 5


def test_what_is_idle_between_kernels_is_found(tmp_path):
    family = published.open_tiny("kandinsky-prior", tmp_path, output_dir=str(tmp_path / "out"))
    gaps = overhead.device_gaps(family, EAGER, 2, torch.device("cpu"), steps=2)
    assert gaps["kernels_per_step"] > 50
    assert 0 <= gaps["idle_share"] < 1
    assert "idles for" in overhead.table({"captured_step": gaps})


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
    assert all(0.8 < row["efficiency"] <= 1.02 for row in rows)
    scaling.chart(rows, tmp_path / "scaling.png")
    assert is_drawn(tmp_path / "scaling.png")
    assert "| Kandinsky 2.2 prior, 128 | 3 |" in scaling.table(rows, hardware)


def test_the_full_size_run_is_measured_by_phase(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["full_size", "--tiny", "--family", "sd", "--json", str(tmp_path / "rows.json")])
    assert full_size.main() == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    # Of so small a run, looks every hundredth of a second may miss phases.
    assert row["phases"].keys() >= {"load", "resume", "export", "export command"}
    assert all(0 < phase["anonymous_gib"] <= phase["peak_gib"] <= row["peak_gib"] for phase in row["phases"].values())
    assert "| sd | export command |" in capsys.readouterr().out


def test_what_does_not_fit_is_computed(monkeypatch):
    monkeypatch.setattr(full_size, "available_bytes", lambda: 2**30)
    row = full_size.run_or_compute("sd", False, False, None)
    assert row["computed_gib"] * 2**30 == 22 * row["parameters"] + full_size.BESIDE
    assert "not run: needs 19.1 GiB (computed), 1.0 available" in full_size.table([row | {"name": "sd"}])


def test_the_model_of_scaling_weighs_overlap_against_the_hosts_launches():
    hardware, row = scaling.Hardware(), {"parameters": 10**9, "tensors": 500, "forward_flops": 10**12}
    # An all-reduce is a reduce-scatter and a gathering.
    reduced, gathered = scaling.communication_seconds(row, 1, 8, 20, hardware)
    assert reduced == pytest.approx(2 * gathered)
    assert scaling.communication_seconds(row, 3, 8, 20, hardware) == pytest.approx((gathered, 2 * gathered), rel=0.1)
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
