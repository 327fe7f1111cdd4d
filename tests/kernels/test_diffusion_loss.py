"""engine::diffusion_loss: the Triton kernel, the C++ operation and the torch reference against double precision."""

import math

import numpy as np
import pytest
import torch

from engine.kernels import diffusion_loss
from engine.kernels.diffusion_loss import launch_diffusion_loss, reference_diffusion_loss
from tests.kernels.cases import DEVICE, DTYPES, LAYOUTS, SHAPES, TOLERANCE, Sample, column, run_kernels, with_layout


class Case(Sample):
    """A sample with a prediction that may carry more channels than the target, compared by the square or by Huber's loss."""

    def __init__(
        self, shape, dtype, layout, has_std=True, offset=0.1, extra_channels=0, mean_layout=None, huber=False, masked=False
    ):
        super().__init__(shape, dtype, mean_layout or layout, has_std, offset)
        generator = torch.Generator().manual_seed(1)
        prediction = torch.randn(shape[0], shape[1] + extra_channels, *shape[2:], generator=generator)
        self.prediction = with_layout(prediction.to(dtype).to(DEVICE), layout)
        self.c_x, self.c_e, self.weight = self.coefficients[2:]
        self.c_x[0] = 0.0  # a sample that predicts the noise alone takes another path through the kernel
        self.c = self.mask = None
        if huber:
            self.c = (10 ** (3 * torch.rand(shape[0], generator=generator) - 2)).to(DEVICE)  # around the size of the errors
            self.coefficients = torch.cat([self.coefficients, self.c[None]])
        if masked:
            self.mask = torch.randint(256, (shape[0], 1, *shape[2:]), generator=generator, dtype=torch.uint8).to(DEVICE)

    def call(self, function, scale=1.0):
        gradient_scale = torch.tensor([scale], device=DEVICE)
        return function(self.prediction, *self.arguments, self.offset, gradient_scale, self.mask)

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        dimensions, channels = self.prediction.dim(), self.mean.shape[1]
        prediction = self.prediction.double().cpu().numpy()
        target = column(self.c_x, dimensions) * self.clean + column(self.c_e, dimensions) * self.noise
        error = prediction[:, :channels] - target
        leaf = torch.from_numpy(error).requires_grad_()
        losses = leaf.square()
        if self.c is not None:
            c = torch.from_numpy(column(self.c, dimensions))
            losses = 2 * c * ((leaf.square() + c.square()).sqrt() - c)
        if self.mask is not None:
            losses = losses * (self.mask.double().cpu() / 255)
        loss = self.weight.double().cpu() * losses.flatten(1).mean(1)
        loss.sum().backward()
        gradient = np.zeros_like(prediction)
        gradient[:, :channels] = leaf.grad.numpy()
        return loss.detach().numpy(), gradient


def check(function, case: Case, scale: float = 1.0) -> None:
    loss, gradient = case.call(function, scale)
    exact_loss, exact_gradient = case.exact()
    exact_gradient = exact_gradient * scale
    assert loss.dtype == torch.float32
    assert gradient.dtype == case.prediction.dtype
    assert gradient.shape == case.prediction.shape
    np.testing.assert_allclose(loss.double().cpu().numpy(), exact_loss, rtol=2e-6, atol=1e-7)
    tolerance = TOLERANCE[gradient.dtype] * float(np.abs(exact_gradient).max())
    np.testing.assert_allclose(gradient.double().cpu().numpy(), exact_gradient, rtol=0, atol=tolerance)


@run_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_is_exact_over_shapes_and_layouts(shape, layout):
    check(launch_diffusion_loss, Case(shape, torch.float32, layout))


@run_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_std", [True, False], ids=["posterior", "mean"])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_kernel_is_exact_over_dtypes_and_options(dtype, has_std, scale):
    check(launch_diffusion_loss, Case((3, 4, 16, 16), dtype, "channels_last", has_std, offset=0.0), scale)


@run_kernels
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 5, 7)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_variance_channels_get_zero_gradient(shape, layout):
    case = Case(shape, torch.float32, layout, extra_channels=4)
    check(launch_diffusion_loss, case)
    _, gradient = case.call(launch_diffusion_loss)
    assert torch.count_nonzero(gradient[:, 4:]) == 0


@run_kernels
@pytest.mark.parametrize(("layout", "mean_layout"), [("channels_last", "contiguous"), ("contiguous", "channels_last")])
def test_prediction_and_posterior_may_differ_in_memory_format(layout, mean_layout):
    check(launch_diffusion_loss, Case((2, 4, 8, 8), torch.float32, layout, mean_layout=mean_layout))


# Latents as buckets have them, of even and of odd sizes; all sizes of samples that a mask may have.
OPTIONS = pytest.mark.parametrize(("huber", "masked"), [(True, False), (False, True), (True, True)], ids=str)
BUCKETS = pytest.mark.parametrize("shape", [(2, 4, 40, 104), (3, 4, 9, 5), (2, 1280)], ids=str)


@run_kernels
@OPTIONS
@pytest.mark.parametrize("shape", [(2, 4, 8, 20), (3, 4, 9, 5), (2, 40)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_is_exact_with_hubers_loss_and_masks(shape, layout, huber, masked):
    check(launch_diffusion_loss, Case(shape, torch.float32, layout, extra_channels=4, huber=huber, masked=masked))


@run_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernel_is_exact_with_hubers_loss_and_masks_over_several_tiles(layout):
    check(launch_diffusion_loss, Case((1, 4, 40, 104), torch.float32, layout, huber=True, masked=True))


@run_kernels
@OPTIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_exact_with_hubers_loss_and_masks_over_dtypes(dtype, huber, masked):
    case = Case((3, 4, 16, 16), dtype, "channels_last", has_std=False, offset=0.0, huber=huber, masked=masked)
    check(launch_diffusion_loss, case, 64.0)


@pytest.mark.parametrize("function", [diffusion_loss, reference_diffusion_loss], ids=["operation", "reference"])
@OPTIONS
@BUCKETS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operation_is_exact_with_hubers_loss_and_masks(function, shape, dtype, layout, huber, masked):
    check(function, Case(shape, dtype, layout, extra_channels=4, huber=huber, masked=masked))
    check(function, Case(shape, dtype, layout, has_std=False, offset=0.0, huber=huber, masked=masked), 64.0)


FUNCTIONS = pytest.mark.parametrize(
    "function",
    [diffusion_loss, reference_diffusion_loss, pytest.param(launch_diffusion_loss, marks=run_kernels)],
    ids=["operation", "reference", "kernel"],
)


@FUNCTIONS
def test_hubers_loss_of_a_tiny_error_keeps_its_digits_and_a_large_constant_squares(function):
    case = Case((2, 4, 8, 8), torch.float32, "contiguous", has_std=False, offset=0.0, huber=True)
    case.coefficients[2:4] = 0.0  # the target is zero
    case.prediction *= 1e-4
    case.coefficients[5] = 1e3  # sqrt(error^2 + c^2) is c in fp32
    loss, gradient = case.call(function)
    squared = (case.prediction.square().flatten(1).mean(1) * case.weight).cpu()
    assert torch.allclose(loss.cpu(), squared, rtol=1e-5, atol=0)
    exact = 2 * case.weight.view(-1, 1, 1, 1) * case.prediction / case.prediction[0].numel()
    assert torch.allclose(gradient, exact, rtol=1e-5, atol=0)


@FUNCTIONS
@pytest.mark.parametrize("c", [1e-6, 0.1, 1e6])
def test_hubers_loss_of_an_error_whose_square_overflows_is_linear_and_one_that_is_no_number_has_none(function, c):
    case = Case((6, 4, 8, 8), torch.float32, "contiguous", has_std=False, offset=0.0, huber=True)
    case.coefficients[2:4] = 0.0
    case.coefficients[5] = c
    case.prediction = torch.tensor([9e17, 2e18, -3e19, 1e25, math.nan, math.inf], device=DEVICE).view(-1, 1, 1, 1).expand(
        6, 4, 8, 8).contiguous()  # fmt: skip
    loss, gradient = case.call(function)
    assert not bool(loss[4:].isfinite().any())
    assert not bool(gradient[4:].isfinite().any())
    error, weight = case.prediction[:4].double(), case.weight[:4].double()
    torch.testing.assert_close(loss[:4].double(), 2 * c * weight * error[:, 0, 0, 0].abs(), rtol=1e-5, atol=0)
    exact = 2 * c * weight.view(-1, 1, 1, 1) * error.sign() / error[0].numel()
    torch.testing.assert_close(gradient[:4].double(), exact, rtol=1e-5, atol=0)


@FUNCTIONS
@pytest.mark.parametrize("huber", [False, True], ids=["squared", "huber"])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 4, 9, 5)], ids=str)
def test_a_white_mask_is_none_and_a_black_one_weighs_nothing(function, shape, huber):
    case = Case(shape, torch.float32, "contiguous", huber=huber, masked=True)
    case.mask.fill_(255)
    white = case.call(function)
    case.mask.zero_()
    black = case.call(function)
    case.mask = None
    for ours, bare in zip(white, case.call(function), strict=True):
        if ours.is_cuda:  # two compiled variants, whose sums and contractions differ
            torch.testing.assert_close(ours, bare, rtol=2e-6, atol=2e-6 * float(bare.abs().max()))
        else:
            assert torch.equal(ours, bare)
    assert not any(torch.count_nonzero(tensor) for tensor in black)


# Without a GPU the operation is the one in C++.
@pytest.mark.parametrize("function", [diffusion_loss, reference_diffusion_loss], ids=["operation", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extra_channels", [0, 4])
def test_operation_is_exact(function, shape, dtype, layout, extra_channels):
    check(function, Case(shape, dtype, layout, extra_channels=extra_channels))
    check(function, Case(shape, dtype, layout, has_std=False, offset=0.0, extra_channels=extra_channels), 64.0)


@pytest.mark.parametrize(("layout", "mean_layout"), [("channels_last", "contiguous"), ("contiguous", "channels_last")])
def test_operation_takes_two_memory_formats(layout, mean_layout):
    check(diffusion_loss, Case((2, 4, 8, 8), torch.float32, layout, mean_layout=mean_layout))


def test_operation_takes_two_precisions():
    case = Case((2, 4, 8, 8), torch.float32, "contiguous")
    case.prediction = case.prediction.to(torch.bfloat16)
    check(diffusion_loss, case)


@run_kernels
def test_the_loss_is_reproducible_bit_for_bit():
    case = Case((1, 4, 32, 64), torch.float32, "contiguous")
    first, second = case.call(launch_diffusion_loss), case.call(launch_diffusion_loss)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_operation_passes_opcheck():
    case = Case((2, 4, 4, 4), torch.float32, "contiguous", extra_channels=2, huber=True, masked=True)
    arguments = (case.prediction, *case.arguments, 0.1, torch.tensor([8.0], device=DEVICE))
    torch.library.opcheck(diffusion_loss, arguments)
    torch.library.opcheck(diffusion_loss, (*arguments, case.mask))


def test_small_fp16_gradients_survive_with_a_scale():
    case = Case((1, 4, 64, 64), torch.float16, "contiguous")
    case.weight.fill_(1e-3)
    _, lost = case.call(diffusion_loss)
    _, kept = case.call(diffusion_loss, 65536.0)
    _, exact = case.exact()
    scale = float(np.abs(exact).max())
    np.testing.assert_allclose(kept.double().cpu().numpy() / 65536, exact, atol=1e-3 * scale)
    assert np.abs(lost.double().cpu().numpy() - exact).max() > 0.05 * scale, "without the scale fp16 cannot hold them"
