"""engine::gelu: kernels and reference against double precision, forward and backward, and under torch.library."""

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import geglu, gelu
from engine.kernels.gelu import (
    _backward,
    _forward,
    gelu_backward_kernel,
    gelu_kernel,
    launch_gelu,
    launch_gelu_backward,
    reference_gelu,
    reference_gelu_backward,
    tiling,
)
from tests.kernels.cases import DEVICE, DTYPES, run_kernels, with_layout

SIDES = [
    pytest.param((launch_gelu, launch_gelu_backward), id="triton", marks=run_kernels),
    pytest.param((reference_gelu, reference_gelu_backward), id="reference"),
]
# Rows and columns: whole tiles, an odd number of rows, columns that fill no tile, and of which none is wide.
SHAPES = [(2, 8, 256), (3, 3, 512), (5, 264), (2, 3, 40), (9, 7), (1, 1)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def plain(x: torch.Tensor, gated: bool) -> torch.Tensor:
    if not gated:
        return F.gelu(x)
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def drawn(shape: tuple[int, ...], gated: bool, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and a gradient of the result."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = 2 * torch.randn(*shape[:-1], shape[-1] * (1 + gated), generator=generator)
    gradient = torch.randn(shape, generator=generator)
    first, second = (with_layout(tensor.to(dtype).to(DEVICE), layout) for tensor in (x, gradient))
    return first, second


def check(side, shape, gated, dtype, layout="contiguous") -> None:
    forward, backward = side
    x, gradient = drawn(shape, gated, dtype, layout)
    exact = x.detach().cpu().double().requires_grad_()
    expected = plain(exact, gated)
    expected.backward(gradient.cpu().double())
    tolerance = TOLERANCE[dtype]
    for result, value in ((forward(x, gated), expected.detach()), (backward(gradient, x, gated), exact.grad)):
        assert result.dtype == dtype
        assert result.is_contiguous()
        torch.testing.assert_close(result.cpu().double(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_those_of_double_precision(side, dtype, gated, shape):
    check(side, shape, gated, dtype)


@pytest.mark.parametrize("side", SIDES)
def test_other_layouts_are_copied(side):
    check(side, (3, 5, 24), True, torch.bfloat16, "strided")


def part_below(x: torch.Tensor) -> torch.Tensor:
    """The normal distribution's part below x, by erfc, which keeps its digits where that is small."""
    return 0.5 * torch.special.erfc(-x * 0.5**0.5)


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of 16 bits."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return values[values.isfinite()]


def unit(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of exact values, as that of larger ones where the value is subnormal, or nearly so in fp32."""
    smallest = torch.finfo(dtype).tiny
    step = torch.finfo(dtype).eps * 2 ** values.abs().clamp_min(smallest).log2().floor()
    return step.clamp_min(2.0**-110)


@run_kernels
@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, 0.006), (torch.float16, 0.04)])
def test_half_precision_hides_the_error_of_every_one_of_its_values(dtype, units):
    """Value and slope before they are rounded, which is by up to half a unit in the last place.

    Near the zero of the slope, at -0.75, its parts are larger than it, and the unit is theirs.
    """
    x = all_values(dtype).float()[None].to(DEVICE)
    constants = tiling(x.shape[-1], torch.float32) | {"COARSE": True}
    programs = (-(-x.shape[-1] // constants["WIDTH"]),)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[programs](y, x, 1, GATED=False, **constants)
    gelu_backward_kernel[programs](slope, torch.ones_like(x), x, 1, GATED=False, **constants)
    wide = x.cpu().double()
    below, density = part_below(wide), torch.exp(-wide * wide / 2) / (2 * torch.pi) ** 0.5
    for result, exact, part in ((y, wide * below, 0 * wide), (slope, below + wide * density, below)):
        error = (result.cpu().double() - exact).abs()
        assert float((error / unit(torch.maximum(exact.abs(), part), dtype)).max()) <= units


@run_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype):
    x = torch.tensor([float("nan"), float("inf"), 1.0], dtype=dtype, device=DEVICE)
    assert launch_gelu(x, False).cpu().isfinite().tolist() == [False, False, True]
    assert launch_gelu_backward(torch.ones_like(x), x, False).cpu().isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("columns", [1280, 2560, 5120, 8192])
def test_no_lane_is_idle_at_the_families_widths(columns):
    """Of SD's transformer blocks and the Kandinsky prior's."""
    assert columns % tiling(columns, torch.bfloat16)["WIDTH"] == 0


@pytest.mark.parametrize("operation", [geglu, gelu])
def test_the_operations_gradients_are_those_of_finite_differences(operation):
    torch.autograd.gradcheck(operation, torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("gated", [True, False])
def test_torch_library_accepts_the_operations(gated):
    x, gradient = drawn((3, 5, 24), gated, torch.bfloat16, "contiguous")
    torch.library.opcheck(_forward, (x.clone().requires_grad_(), gated))
    torch.library.opcheck(_backward, (gradient, x, gated))


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [geglu, gelu])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_between_two_products_it_adds_no_kernel(operation, dtype):
    """Both passes of linear, GELU, linear on a GPU: the values of double precision, and no pass over memory but the kernels."""
    columns = 256
    x = torch.randn(4, 77, 64, dtype=dtype, device="cuda", requires_grad=True)
    wide = columns * (2 if operation is geglu else 1)
    first, second = (torch.randn(*size, dtype=dtype, device="cuda") / 8 for size in ((wide, 64), (64, columns)))

    def block(x: torch.Tensor) -> torch.Tensor:
        return F.linear(operation(F.linear(x, first)), second)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    upstream = torch.randn(4, 77, 64, dtype=dtype, device="cuda")
    torch.autograd.grad(compiled(x), x, upstream)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = compiled(x)
        (x_gradient,) = torch.autograd.grad(y, x, upstream)
        torch.cuda.synchronize()
    kernels = {event.key for event in profile.key_averages()}
    assert {"gelu_kernel", "gelu_backward_kernel"} <= kernels
    assert not [kernel for kernel in kernels if "triton_" in kernel or "opy" in kernel]
    exact = x.detach().double().requires_grad_()
    expected = F.linear(plain(F.linear(exact, first.double()), operation is geglu), second.double())
    expected.backward(upstream.double())
    tolerance = 10 * TOLERANCE[dtype]
    for result, value in ((y, expected.detach()), (x_gradient, exact.grad)):
        scale = float(value.abs().max())
        torch.testing.assert_close(result.detach().double(), value, rtol=tolerance, atol=tolerance * scale)
    torch._dynamo.reset()
