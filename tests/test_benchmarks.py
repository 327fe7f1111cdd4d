"""The benchmarks run on a CPU, and count what is published."""

import json

import pytest

from benchmarks import encode, kernels, sizes

# Parameters in millions and training TFLOP per sample, as published configurations come to.
EXPECTED = {
    "SD 1.5, 512 px": (859.5, 2.41), "SD 2.1, 512 px": (865.9, 2.41), "Kandinsky 2.2 decoder, 512 px": (1253, 2.57),
    "Kandinsky 2.2 decoder, 768 px": (1253, 5.98), "Kandinsky 2.2 prior": (1026, 0.494),
    "Wuerstchen v2 prior, 768 px": (994, 3.46),
}  # fmt: skip


@pytest.mark.parametrize("checkpoint", EXPECTED)
def test_full_size_models_have_the_published_size(checkpoint):
    parameters, training = EXPECTED[checkpoint]
    row = sizes.measure(checkpoint)
    assert row["parameters"] / 1e6 == pytest.approx(parameters, rel=6e-4)
    assert 3 * row["forward_flops"] / 1e12 == pytest.approx(training, rel=2e-3)
    assert checkpoint in sizes.table([row])


def test_the_encode_benchmark_runs_on_tiny_models(monkeypatch, tmp_path, capsys):
    output = tmp_path / "encode.json"
    monkeypatch.setattr("sys.argv", ["encode", "--tiny", "--images", "2", "--batch", "2", "--json", str(output)])
    assert encode.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["model"] for row in rows] == list(encode.TINY)
    assert all(row["images_per_second"] > 0 for row in rows)
    assert "wuerstchen" in capsys.readouterr().out


def test_the_kernel_benchmark_runs_on_a_small_shape(monkeypatch, tmp_path, capsys):
    output = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["kernels", "--small", "--json", str(output)])
    assert kernels.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["operation"] for row in rows} == {"add_noise", "diffusion_loss"}
    assert all(row["gain"].keys() == {"script", "eager"} and row["microseconds"]["engine"] > 0 for row in rows)
    assert "diffusion_loss" in capsys.readouterr().out
