"""Drawing is compared and counted: what is timed is restored, and counts are those of known operations."""

import torch

from benchmarks import sample
from benchmarks.tools.compiling import compiling_cheaply
from benchmarks.tools.cost import OneAttention


def test_launches_bytes_and_reads_are_counted():
    with sample.Counted() as counted, torch.no_grad():
        x = torch.ones(4, 8)
        y = x.view(8, 4).t() @ torch.zeros(8, 2)
        assert y.sum().item() == 0
    assert (counted.launches, counted.reads) == (4, 1)  # ones, zeros, the product, the sum
    assert counted.numbers == 32 + 16 + (32 + 16 + 8) + (8 + 1)
    assert counted.matrix_numbers == 32 + 16 + 8


def test_attention_is_one_launch_however_it_is_called():
    counted, query = sample.Counted(), torch.empty(1, 2, 8, 4, device="meta")
    with OneAttention(counted), counted:
        torch.nn.functional.scaled_dot_product_attention(query=query, key=query, value=query, attn_mask=None)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counted.matrix_numbers == 2 * 4 * 64


def test_a_published_denoiser_is_counted_and_the_reads_of_its_schedulers():
    row = sample.count("Wuerstchen prior, 1024 px")
    assert row["parameters"] == 993_636_896
    assert row["launches"] > 1000
    assert 2 * row["parameters"] < row["least_mib"] * 2**20 < row["mib"] * 2**20
    assert row["host_reads"] == 2
    assert "| Wuerstchen prior, 1024 px | 993636896 |" in sample.table([{"name": "Wuerstchen prior, 1024 px"} | row])


def test_the_time_of_a_call_is_told_by_part_and_nothing_stays_changed():
    device = torch.device("cpu")
    pipeline = sample.open_way("engine", "sd", "tiny", device)
    seconds = sample.breakdown(pipeline, lambda: pipeline("a", num_inference_steps=2), device)
    assert min(seconds[part] for part in ("text encoder", "denoiser", "decoder", "scheduler", "host")) > 0
    assert "forward" not in vars(pipeline.unet)
    assert "step" not in vars(pipeline.scheduler)


def test_one_way_alone_is_opened_and_compared_with_none(monkeypatch):
    opened = []
    opens = sample.open_way
    monkeypatch.setattr(sample, "open_way", lambda way, *others: opened.append(way) or opens(way, *others))
    with compiling_cheaply():
        row = sample.measure("sd", "tiny", 1, 1, 1, torch.device("cpu"), ["compiled"])
    assert opened == ["compiled"]
    assert row["seconds"]["compiled"] > 0
    assert row["gain"] == row["pixels_apart"] == {}
    assert "| sd |" in sample.table([{"name": "sd"} | row])
