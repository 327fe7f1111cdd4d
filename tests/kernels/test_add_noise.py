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
    noisy = function(*sample.arguments, sample.offset, perturbation)
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
    for function in (launch_add_noise, add_noise):
        noisy = function(*sample.arguments, 0.0, 0.0)
        assert noisy.is_contiguous(memory_format=torch.channels_last)


@run_kernels
def test_noise_does_not_depend_on_the_memory_format_or_the_batch():
    mean, std, coefficients, seed, slots = Sample((4, 4, 8, 8), torch.float32, "contiguous", has_std=True, offset=0).arguments
    whole = launch_add_noise(mean, std, coefficients, seed, slots, 0.1, 0.1)
    last = mean.contiguous(memory_format=torch.channels_last)
    # Compiled for another layout, products and sums may be contracted otherwise.
    compiled = {"rtol": 0, "atol": 1e-6} if torch.cuda.is_available() else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(launch_add_noise(last, std, coefficients, seed, slots, 0.1, 0.1), whole, **compiled)
    for row in range(4):
        part = slice(row, row + 1)
        alone = launch_add_noise(mean[part], std[part], coefficients[:, part], seed, slots[part], 0.1, 0.1)
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("has_std", [True, False], ids=["posterior", "mean"])
def test_operation_passes_opcheck(has_std):
    sample = Sample((2, 4, 4, 4), torch.float32, "contiguous", has_std, offset=0.1)
    torch.library.opcheck(add_noise, (*sample.arguments, 0.1, 0.2))
