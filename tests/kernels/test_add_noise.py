"""engine::add_noise: the Triton kernel, the C++ operation and the torch reference against double precision."""

import numpy as np
import pytest
import torch

from engine.kernels import add_noise
from engine.kernels.add_noise import launch_add_noise, reference_add_noise
from tests.kernels.cases import DTYPES, LAYOUTS, SHAPES, TOLERANCE, Sample, column, run_kernels


def exact(sample: Sample, perturbation: float) -> np.ndarray:
    dimensions = sample.mean.dim()
    alpha, sigma = (column(values, dimensions) for values in sample.coefficients[:2])
    return alpha * sample.clean + sigma * (sample.noise + perturbation * sample.normals(4, sample.mean.shape[1:]))


def check(function, sample: Sample, perturbation: float) -> None:
    alpha, sigma, _ = sample.coefficients
    noisy = function(sample.mean, sample.std, alpha, sigma, sample.seed, sample.slots, sample.offset, perturbation)
    assert noisy.shape == sample.mean.shape
    assert noisy.dtype == sample.mean.dtype
    tolerance = TOLERANCE[noisy.dtype]
    np.testing.assert_allclose(noisy.double().cpu().numpy(), exact(sample, perturbation), atol=tolerance, rtol=tolerance)


@run_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_is_exact_over_shapes_and_layouts(shape, layout):
    check(launch_add_noise, Sample(shape, torch.float32, layout, has_std=True, offset=0.1), 0.2)


@run_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_std", [True, False], ids=["posterior", "mean"])
@pytest.mark.parametrize(("offset", "perturbation"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_kernel_is_exact_over_dtypes_and_options(dtype, has_std, offset, perturbation):
    check(launch_add_noise, Sample((2, 4, 16, 16), dtype, "channels_last", has_std, offset), perturbation)


# Without a GPU the operation is the one in C++.
@pytest.mark.parametrize("function", [add_noise, reference_add_noise], ids=["operation", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operation_is_exact(function, shape, dtype, layout):
    check(function, Sample(shape, dtype, layout, has_std=True, offset=0.1), 0.2)
    check(function, Sample(shape, dtype, layout, has_std=False, offset=0.0), 0.0)


@run_kernels
def test_kernel_keeps_the_memory_format():
    sample = Sample((2, 4, 8, 8), torch.float32, "channels_last", has_std=True, offset=0.0)
    alpha, sigma, _ = sample.coefficients
    for function in (launch_add_noise, add_noise):
        noisy = function(sample.mean, sample.std, alpha, sigma, sample.seed, sample.slots, 0.0, 0.0)
        assert noisy.is_contiguous(memory_format=torch.channels_last)


@run_kernels
def test_noise_does_not_depend_on_the_memory_format_or_the_batch():
    contiguous = Sample((4, 4, 8, 8), torch.float32, "contiguous", has_std=True, offset=0.1)
    alpha, sigma, _ = contiguous.coefficients
    options = (contiguous.offset, 0.1)
    whole = launch_add_noise(contiguous.mean, contiguous.std, alpha, sigma, contiguous.seed, contiguous.slots, *options)
    last = contiguous.mean.contiguous(memory_format=torch.channels_last)
    assert torch.equal(launch_add_noise(last, contiguous.std, alpha, sigma, contiguous.seed, contiguous.slots, *options), whole)
    for row in range(4):
        part = slice(row, row + 1)
        alone = launch_add_noise(
            contiguous.mean[part], contiguous.std[part], alpha[part], sigma[part], contiguous.seed,
            contiguous.slots[part], *options,
        )  # fmt: skip
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("has_std", [True, False], ids=["posterior", "mean"])
def test_operation_passes_opcheck(has_std):
    sample = Sample((2, 4, 4, 4), torch.float32, "contiguous", has_std, offset=0.1)
    alpha, sigma, _ = sample.coefficients
    mean = sample.mean.clone().requires_grad_()
    std = sample.std.clone().requires_grad_() if has_std else None
    torch.library.opcheck(add_noise, (mean, std, alpha, sigma, sample.seed, sample.slots, 0.1, 0.2))


def test_gradients_are_those_of_the_formula():
    sample = Sample((2, 4, 4, 4), torch.float32, "contiguous", has_std=True, offset=0.0)
    alpha, sigma, _ = sample.coefficients
    mean, std = sample.mean.clone().requires_grad_(), sample.std.clone().requires_grad_()
    upstream = torch.randn_like(mean)
    add_noise(mean, std, alpha, sigma, sample.seed, sample.slots, 0.0, 0.0).backward(upstream)
    expected = column(alpha, 4) * upstream.double().cpu().numpy()
    np.testing.assert_allclose(mean.grad.cpu().numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(std.grad.cpu().numpy(), expected * sample.normals(1, (4, 4, 4)), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
def test_gradients_are_those_of_finite_differences():
    sample = Sample((2, 2, 2, 2), torch.float32, "contiguous", has_std=True, offset=0.1)
    alpha, sigma, _ = sample.coefficients
    inputs = [sample.mean.clone().requires_grad_(), sample.std.clone().requires_grad_()]

    def noisy(mean, std):
        return add_noise(mean, std, alpha, sigma, sample.seed, sample.slots, 0.1, 0.2)

    # Linear, so that large differences are exact up to rounding.
    torch.autograd.gradcheck(noisy, inputs, eps=0.1, atol=1e-4, rtol=1e-4)
