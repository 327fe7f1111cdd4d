"""The simulation of sums over processes, and what the engine's threshold is drawn from."""

import pytest
import torch

from benchmarks.operations import reduction
from engine.loop.weights.zero_options import FP32_REDUCTION


def test_a_ring_adds_in_a_row_and_a_tree_in_pairs():
    parts = (
        torch.tensor([[256.0], [1.0], [1.0], [1.0]]).bfloat16().repeat_interleave(reduction.PER_NODE, 0) / reduction.PER_NODE
    )
    assert reduction.ring(parts) == 256  # to which less than half of its last place is added
    assert reduction.tree(parts) == 258  # (256 + 1) + (1 + 1), of which the first pair rounds down
    assert reduction.error(torch.tensor([2.0]), torch.tensor([[4.0], [4.0]])) == 0.5


def test_fp32_begins_where_bf16_loses_more_than_two_percent():
    rows = reduction.measure([192, FP32_REDUCTION], 1024)
    alike = ("equal", "noise 0.1")  # processes draw samples, timesteps and noise of their own
    worst = {world: max(row["bf16 ring"] for row in rows if row["processes"] == world and row["gradients"] not in alike)
             for world in (192, FP32_REDUCTION)}  # fmt: skip
    assert worst[192] < 0.025 < 0.03 < worst[FP32_REDUCTION]
    assert all(row["fp32"] < 1e-6 and row["bf16 tree"] < 0.01 for row in rows)
    assert "| bf16 ring | noise alone |" in reduction.table(rows)


def test_a_models_gradients_are_noisy():
    found = reduction.gradients_of_a_model((0, 1), world=8, elements=64)
    assert list(found) == ["tiny model after 0 steps", "tiny model after 1 steps"]
    assert all(gradients.shape == (8, 64) and reduction.errors(gradients)["bf16 ring"] < 0.02 for gradients in found.values())
    assert reduction.noise(torch.tensor([[1.0, 3.0], [3.0, 5.0]])) == pytest.approx((4 / (4 + 16 - 2)) ** 0.5)
