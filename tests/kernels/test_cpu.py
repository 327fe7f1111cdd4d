"""The C++ operations: what only they could get wrong. Their results are checked with those of the kernels."""

import pytest
import torch

from engine.kernels import add_noise, cpu, diffusion_loss
from engine.kernels.add_noise import reference_add_noise
from engine.kernels.diffusion_loss import reference_diffusion_loss
from tests import reference

SEED, SLOTS = 2**62 + 12345, [0, 1, 2**31, 2**40 + 3]

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


def arguments(shape=(4, 4, 64, 64), dtype=torch.float32, offset=0.1, perturbation=0.1) -> tuple:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(shape, generator=generator).to(dtype), torch.rand(shape, generator=generator).to(dtype)
    coefficients = torch.rand(5, shape[0], generator=generator)
    return mean, std, coefficients, torch.tensor([SEED]), torch.tensor(SLOTS[: shape[0]]), offset, perturbation


def loss_arguments(prediction: torch.Tensor) -> tuple:
    return prediction, *arguments()[:-1], torch.ones(1)


def test_normals_are_those_of_double_precision():
    slots = torch.tensor(SLOTS)
    drawn = add_noise(torch.zeros(4, 4, 64, 64), None, torch.ones(5, 4), torch.tensor([SEED]), slots, 0.0, 0.0)
    expected = torch.from_numpy(reference.normals(SEED, SLOTS, 0, (4, 64, 64)))
    assert (drawn.double() - expected).abs().max() < 2e-6


def test_neither_the_batch_nor_the_memory_format_nor_the_threads_show():
    mean, std, coefficients, seed, slots, *scales = arguments()
    whole = add_noise(mean, std, coefficients, seed, slots, *scales)
    last = mean.contiguous(memory_format=torch.channels_last)
    assert torch.equal(add_noise(last, std, coefficients, seed, slots, *scales), whole)
    for row in range(4):
        part = slice(row, row + 1)
        alone = add_noise(mean[part], std[part], coefficients[:, part], seed, slots[part], *scales)
        assert torch.equal(alone, whole[part])
    losses = diffusion_loss(*loss_arguments(whole))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(add_noise(mean, std, coefficients, seed, slots, *scales), whole)
        for ours, before in zip(diffusion_loss(*loss_arguments(whole)), losses, strict=True):
            assert torch.equal(ours, before)
    finally:
        torch.set_num_threads(threads)


def test_values_that_are_not_finite_stay_so():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        mean, _, coefficients, seed, slots, *_ = arguments(dtype=dtype)
        mean[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        noisy = add_noise(mean, None, coefficients, seed, slots, 0.0, 0.0)
        assert noisy[0, 0, 0, 0].isnan()
        assert noisy[0, 0, 0, 1:3].tolist() == [float("inf"), float("-inf")]
        assert noisy[0, 0, 0, 3:].isfinite().all()
        coefficients[2] = 0
        loss, gradient = diffusion_loss(mean, mean, None, coefficients, seed, slots, 0.0, torch.ones(1))
        assert loss[0].isnan()
        assert loss[1:].isfinite().all()
        assert gradient[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("missing", ["library", "dtype"])
def test_the_reference_steps_in(missing, monkeypatch):
    values = arguments(dtype=torch.float64 if missing == "dtype" else torch.float32)
    if missing == "library":
        monkeypatch.setattr(cpu, "library", lambda: None)
    assert torch.equal(add_noise(*values), reference_add_noise(*values))
    prediction = torch.randn_like(values[0])
    for ours, theirs in zip(
        diffusion_loss(*loss_arguments(prediction)), reference_diffusion_loss(*loss_arguments(prediction)), strict=True
    ):
        assert torch.equal(ours, theirs)
