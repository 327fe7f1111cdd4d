"""engine::group_norm_silu: kernels and reference against double precision, forward and backward, and under torch.library."""

import sys

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import group_norm_silu
from engine.kernels.group_norm_silu import (
    _backward,
    _forward,
    launch_group_norm_silu,
    launch_group_norm_silu_backward,
    reference_group_norm_silu,
    reference_group_norm_silu_backward,
    tiling,
)
from tests.kernels.cases import DEVICE, DTYPES, run_kernels, with_layout

EPSILON = 1e-5
SIDES = [
    pytest.param((launch_group_norm_silu, launch_group_norm_silu_backward), id="triton", marks=run_kernels),
    pytest.param((reference_group_norm_silu, reference_group_norm_silu_backward), id="reference"),
]
# Channels per group: 10, as at SD's highest resolution; 3; 40, 12 and 1. Positions: a square, odd, and tokens of attention.
SHAPES = [((2, 80, 8, 8), 8), ((3, 6, 5, 7), 2), ((1, 80, 3, 3), 2), ((2, 24, 17), 2), ((2, 4, 3, 3), 4), ((2, 9, 2, 2), 3)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case:
    """Inputs, and results in double precision by torch's own operations."""

    def __init__(self, shape, groups, dtype, layout="channels_last", silu=True, shared=False, mean=0.0) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        self.groups, self.silu = groups, silu
        self.x = with_layout((torch.randn(shape, generator=generator) + mean).to(dtype).to(DEVICE), layout)
        self.y_gradient = with_layout(torch.randn(shape, generator=generator).to(dtype).to(DEVICE), layout)
        rows = 1 if shared else shape[0]
        self.weight, self.bias = (
            torch.randn(rows, shape[1], generator=generator).to(dtype).to(DEVICE).expand(shape[:2]) for _ in range(2)
        )
        x, weight, bias = (tensor.detach().cpu().double().requires_grad_() for tensor in (self.x, self.weight, self.bias))
        per_channel = (*shape[:2], *[1] * (len(shape) - 2))
        y = F.group_norm(x, groups, eps=EPSILON) * weight.view(per_channel) + bias.view(per_channel)
        self.y = F.silu(y) if silu else y
        self.y.backward(self.y_gradient.cpu().double())
        self.gradients = [x.grad, weight.grad, bias.grad]

    def check(self, side, tolerance) -> None:
        forward, backward = side
        y, mean, rstd = forward(self.x, self.weight, self.bias, self.groups, EPSILON, self.silu)
        assert y.dtype == self.x.dtype
        assert y.movedim(1, -1).is_contiguous()
        torch.testing.assert_close(y.cpu().double(), self.y.detach(), rtol=tolerance, atol=tolerance)
        results = backward(self.y_gradient, self.x, self.weight, self.bias, mean, rstd, self.groups, self.silu)
        for name, result, exact in zip(("x", "weight", "bias"), results, self.gradients, strict=True):
            size = float(exact.abs().max())
            torch.testing.assert_close(result.cpu().double(), exact, rtol=tolerance, atol=tolerance * size, msg=name)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_results_are_those_of_double_precision(side, dtype, silu, shape, groups):
    Case(shape, groups, dtype, silu=silu).check(side, TOLERANCE[dtype])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_other_memory_formats_are_copied(side, layout):
    Case((2, 20, 8, 8), 2, torch.float32, layout=layout).check(side, 2e-5)


@pytest.mark.parametrize("side", SIDES)
def test_groups_larger_than_a_tile(side):
    Case((1, 20, 40, 30), 2, torch.float32, shared=True).check(side, 5e-5)


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that a few hundred positions are many chunks, each of several turns."""
    for name, value in {"TILE": 256, "MAX_CHUNKS": 5, "TURNS": 2}.items():
        monkeypatch.setattr(sys.modules[tiling.__module__], name, value)


@pytest.mark.parametrize("side", SIDES)
def test_the_variance_survives_a_mean_a_thousand_times_larger(side, small_tiles):
    case = Case((2, 12, 16, 16), 2, torch.float32, mean=1000.0)
    y = side[0](case.x, case.weight, case.bias, 2, EPSILON, True)[0]
    torch.testing.assert_close(y.cpu().double(), case.y.detach(), rtol=1e-3, atol=1e-3)


@run_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    [(120, 12, (11, 8)), (192, 2, (7, 9)), (130, 1, (6, 8)), (24, 2, (16, 16)), (64, 32, (8, 8))],
)
def test_groups_are_added_up_over_chunks_and_blocks_of_channels(dtype, channels, groups, size, small_tiles):
    """Groups of 10 and 96 channels that a block's edge cuts, one of all channels, and groups of 2; the last chunk not full."""
    case = Case((2, channels, *size), groups, dtype, shared=True)
    (_, chunks, _), chunk, constants = tiling(case.x, groups, True, nvidia=False)
    assert chunks > 2
    assert chunk > constants["ROWS"]
    case.check(SIDES[0].values[0], 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560, 384, 768, 1152, 1536, 2304])
@pytest.mark.parametrize("side", [8, 12, 16, 24, 32, 48, 64, 96])
def test_no_lane_is_idle_and_programs_suffice_at_the_families_sizes(channels, side):
    """Of SD's and Kandinsky's decoder's UNets: each of 132 multiprocessors has a program or more, at small batches too."""
    for batch in (4, 32):
        x = torch.empty(batch, channels, side, side, dtype=torch.bfloat16, device="meta")
        (blocks, chunks, _), chunk, constants = tiling(x, 32, True, nvidia=True)
        assert blocks * constants["WIDTH"] == channels
        assert constants["FULL"] or side == 12
        assert (chunks - 1) * chunk < side * side <= chunks * chunk
        assert blocks * chunks * batch >= min(132, blocks * batch * (side * side // constants["ROWS"]))


def test_buckets_of_one_area_share_compiled_kernels():
    """64 x 64, 72 x 56 and 75 x 53 latents, whose last tile is not full: no kernel is compiled for a size."""
    constants = []
    for positions in (64 * 64, 72 * 56, 75 * 53):
        x = torch.empty(4, 320, positions, dtype=torch.bfloat16, device="meta")
        constants.append(tiling(x, 32, True, nvidia=True).constants)
    assert constants[0] == constants[1] == constants[2] | {"FULL": True}
    for name in ("sums", "silu", "gradient_sums", "silu_backward"):
        kernel = getattr(sys.modules[tiling.__module__], f"group_norm_{name}_kernel")
        options = getattr(kernel, "kwargs", None) or vars(kernel)  # of the interpreter, and of what compiles
        assert options["do_not_specialize"] == ["positions", "chunk"]


def test_half_precision_hides_what_the_special_function_units_tanh_loses():
    """tanh.approx.f32 is within 2^-10.987 of the exact value (PTX ISA); here by that much too large, and too small."""
    given = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    exact = given.sigmoid()
    for error in (2**-10.987, -(2**-10.987)):
        sigmoid = 0.5 * (0.5 * given).tanh() * (1 + error) + 0.5
        # Of values of that size bf16 keeps 2^-9.
        assert torch.all((given * (sigmoid - exact)).abs() <= given.abs() * 2**-11.9)
        slopes = [factor * (1 + given * (1 - factor)) for factor in (sigmoid, exact)]
        assert float((slopes[0] - slopes[1]).abs().max()) < TOLERANCE[torch.bfloat16] / 2


class _Kernels(torch.autograd.Function):
    """The Triton kernels under autograd, on whatever device they run."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        y, mean, rstd = launch_group_norm_silu(x, weight, bias, 2, EPSILON, True)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, y_gradient):
        return launch_group_norm_silu_backward(y_gradient, *ctx.saved_tensors, 2, True)


@run_kernels
@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
def test_the_kernels_gradients_are_those_of_finite_differences():
    case = Case((1, 4, 2, 2), 2, torch.float32)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.weight, case.bias)]
    torch.autograd.gradcheck(_Kernels.apply, inputs, eps=1e-2, atol=2e-3, rtol=2e-2)


def test_the_operations_gradients_are_those_of_finite_differences():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6, 3, 2), (6,), (2, 6))]
    for silu in (True, False):
        torch.autograd.gradcheck(lambda x, weight, bias, silu=silu: group_norm_silu(x, weight, bias, 2, EPSILON, silu), inputs)


def test_torch_library_accepts_the_operations():
    case = Case((2, 20, 8, 8), 2, torch.bfloat16)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, case.weight, case.bias)]
    torch.library.opcheck(_forward, (*inputs, 2, EPSILON, True))
    with torch.no_grad():
        _, mean, rstd = _forward(*inputs, 2, EPSILON, True)
    torch.library.opcheck(_backward, (case.y_gradient, *(t.detach() for t in inputs), mean, rstd, 2, True))
