"""What a step keeps in memory, counted for the smallest of the published models."""

import pytest
import torch

from benchmarks.steps import memory
from benchmarks.tools.cost import operations

CHECKPOINT = "Kandinsky 2.2 prior"


@pytest.fixture(scope="module")
def rows(monkeypatch_module):
    monkeypatch_module.setattr(memory, "BATCHES", (1, 2))
    return {memory.words_of(way): memory.count(CHECKPOINT, way) for way in ({}, memory.LORA)}


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_a_lora_keeps_less_and_computes_less(rows):
    full, lora = rows.values()
    assert full["trained"] > 1e9 > 100 * lora["trained"] / 2
    assert lora["flops"] < 0.75 * full["flops"], "no gradients of the base's weights"
    assert lora["bytes_1"] < full["bytes_1"] / 5
    assert lora["bytes_1"] < lora["bytes_2"] < full["bytes_2"] / 5


def test_the_peak_counts_what_lives_at_a_time():
    with memory._bf16(), memory._Peak() as peak:
        kept = torch.empty(100)
        for _ in range(3):
            torch.empty(50)
    assert peak.peak == 300
    assert peak.now == kept.nbytes


def test_the_backward_pass_of_a_convolution_in_groups_costs_two_forward_passes():
    with torch.device("meta"), operations() as counter:
        x, weight = torch.empty(2, 8, 10, 10, requires_grad=True), torch.empty(8, 1, 3, 3, requires_grad=True)
        y = torch.nn.functional.conv2d(x, weight, groups=8)
        forward = counter.get_total_flops()
        torch.autograd.grad(y, [x, weight], y)
    assert forward == 2 * 2 * 8 * 8 * 8 * 9
    assert counter.get_total_flops() == 3 * forward


def test_between_the_counted_batches_are_lines(monkeypatch):
    monkeypatch.setattr(memory, "BATCHES", (1, 8, 16))
    row = {"bytes_1": 10, "bytes_8": 24, "bytes_16": 56}  # 2 a sample, then 4
    assert [memory.fits(row, room) for room in (9, 10, 23, 24, 27, 28, 60)] == [0, 1, 7, 8, 8, 9, 16]
