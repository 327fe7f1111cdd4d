"""engine::gelu_response_norm: kernels and reference against diffusers' modules in double precision, and dropout's masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.wuerstchen.modeling_wuerstchen_common import GlobalResponseNorm

from engine import philox
from engine.kernels import gelu_response_norm
from engine.kernels.gelu_response_norm import (
    PIECE,
    _backward,
    _forward,
    launch_gelu_response_norm,
    launch_gelu_response_norm_backward,
    reference_gelu_response_norm,
    reference_gelu_response_norm_backward,
)
from tests import reference
from tests.kernels.cases import DEVICE, DTYPES, captured, run_kernels, with_layout

SIDES = [
    pytest.param((launch_gelu_response_norm, launch_gelu_response_norm_backward), id="triton", marks=run_kernels),
    pytest.param((reference_gelu_response_norm, reference_gelu_response_norm_backward), id="reference"),
]
# Several programs over the channels, of which the last is not full; odd channels; several over the positions; one position.
SHAPES = [(2, 5, 7, 136), (1, 3, 5, 20), (1, 15, 14, 8), (2, 1, 1, 9)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SEED = 2**31 - 2


def weights(shape: tuple[int, ...], probability: float, seed: int = SEED) -> torch.Tensor:
    """What dropout multiplies by, from Philox in numpy."""
    samples, channels, positions = shape[0], shape[-1], int(np.prod(shape[1:-1]))
    pieces, dropped = -(-channels // PIECE), round(65536 * probability)
    drawn = [reference.words(seed, sample, philox.DROPOUT, 4 * positions * pieces) for sample in range(samples)]
    halves = np.stack([np.stack(drawn) & np.uint64(0xFFFF), np.stack(drawn) >> np.uint64(16)], -1)
    numbers = halves.reshape(samples, positions, pieces * PIECE)[..., :channels]
    return torch.from_numpy((numbers >= dropped) * (65536 / (65536 - dropped))).view(shape)


class Case:
    """Inputs, and results in double precision by diffusers' module and torch's own operations."""

    def __init__(self, shape, dtype, probability=0.0, layout="contiguous") -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        self.probability = probability
        self.seed = torch.tensor([SEED], device=DEVICE) if probability else None
        u = 1.5 * torch.randn(shape, generator=generator)
        u[..., 3] = 0  # a channel that is dead, whose norm has no derivative
        self.u = with_layout(u.to(dtype).to(DEVICE), layout)
        self.y_gradient = with_layout(torch.randn(shape, generator=generator).to(dtype).to(DEVICE), layout)
        self.gamma, self.beta = (torch.randn(shape[-1], generator=generator).to(dtype).to(DEVICE) for _ in range(2))
        norm = GlobalResponseNorm(shape[-1]).double()
        for parameter, value in ((norm.gamma, self.gamma), (norm.beta, self.beta)):
            parameter.data = value.double().cpu().view(1, 1, 1, -1)
        exact = self.u.detach().cpu().double().requires_grad_()
        y = norm(F.gelu(exact)) * (weights(shape, probability) if probability else 1.0)
        y.backward(self.y_gradient.cpu().double())
        self.results = [y.detach(), exact.grad, norm.gamma.grad.flatten(), norm.beta.grad.flatten()]

    def check(self, side, tolerance) -> None:
        forward, backward = side
        y, norms, mean = forward(self.u, self.gamma, self.beta, self.seed, self.probability)
        found = backward(self.y_gradient, self.u, self.gamma, norms, mean, self.seed, self.probability)
        assert y.dtype == found[0].dtype == self.u.dtype
        assert y.is_contiguous()
        results = y, found[0], found[1].sum(0), found[2].sum(0)
        for name, result, exact in zip(("y", "u", "gamma", "beta"), results, self.results, strict=True):
            size = float(exact.abs().max())
            torch.testing.assert_close(result.cpu().double(), exact, rtol=tolerance, atol=tolerance * size, msg=name)
        assert torch.equal(y.cpu() == 0, self.results[0].to(y.dtype) == 0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_those_of_double_precision(side, dtype, probability, shape):
    Case(shape, dtype, probability).check(side, TOLERANCE[dtype])


@pytest.mark.parametrize("side", SIDES)
def test_other_memory_is_copied(side):
    Case((2, 4, 4, 24), torch.float32, 0.5, layout="strided").check(side, 1e-5)


@run_kernels
def test_bf16_hides_what_the_polynomial_leaves_out():
    """Of the activation, which the norm of a single position gives in fp32, and of its slope, where gamma is zero."""
    u = torch.linspace(-9, 9, 1024).bfloat16().view(-1, 1, 1, 64).to(DEVICE)
    zeros = torch.zeros(64, dtype=torch.bfloat16, device=DEVICE)
    _, norms, mean = launch_gelu_response_norm(u, zeros, zeros, None, 0.0)
    slope = launch_gelu_response_norm_backward(torch.ones_like(u), u, zeros, norms, mean, None, 0.0)[0]
    exact = u.cpu().double().requires_grad_()
    g = F.gelu(exact)
    g.sum().backward()
    # bf16 keeps 2^-8; the activation at -5.5 is 1.0e-7, and what the polynomial makes of it beyond differs by less than 1e-10.
    torch.testing.assert_close(norms.cpu().double(), g.detach().abs().view(norms.shape), rtol=2**-11.7, atol=1e-10)
    torch.testing.assert_close(slope.cpu().double(), exact.grad, rtol=1.04 * 2**-7, atol=1e-4)  # cut off by the interpreter


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_through(side, dtype, value):
    u, ones = torch.zeros(1, 2, 2, 8, dtype=dtype, device=DEVICE), torch.ones(8, dtype=dtype, device=DEVICE)
    u[0, 1, 0, 2] = value
    assert not side[0](u, ones, ones, None, 0.0)[0][..., 2].isfinite().any()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("probability", [1.0, 1 - 2**-18])
def test_dropout_of_all_leaves_zeros(side, probability):
    """Of 98,304 numbers, one in 65,536 would come through."""
    case = Case((2, 8, 96, 64), torch.float32)
    seed = torch.tensor([SEED], device=DEVICE)
    y, norms, mean = side[0](case.u, case.gamma, case.beta, seed, probability)
    found = side[1](case.y_gradient, case.u, case.gamma, norms, mean, seed, probability)
    assert not any(tensor.any() for tensor in (y, *found))


@pytest.mark.parametrize("side", SIDES)
def test_nothing_but_zeros_has_finite_gradients(side):
    u, ones = torch.zeros(1, 2, 2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    y, norms, mean = side[0](u, ones, ones, None, 0.0)
    found = side[1](torch.ones_like(u), u, ones, norms, mean, None, 0.0)
    assert torch.equal(y, torch.ones_like(u))
    assert torch.equal(found[0], torch.full_like(u, 0.5))
    assert all(tensor.isfinite().all() for tensor in found)


def test_dropout_keeps_the_mean_and_another_seed_drops_others():
    torch.manual_seed(3)
    u, zeros, ones = torch.ones(2, 32, 32, 64, device=DEVICE), torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)

    def draw() -> torch.Tensor:
        return gelu_response_norm(u, zeros, ones, 0.3).cpu()

    first, second = draw(), draw()
    plain = float(gelu_response_norm(u, zeros, ones).mean())
    # Of 131,072 elements, five standard deviations.
    assert float((first == 0).double().mean()) == pytest.approx(0.3, abs=0.0064)
    assert float(first.double().mean()) == pytest.approx(plain, rel=0.0091)
    assert float(((first == 0) == (second == 0)).double().mean()) == pytest.approx(0.3**2 + 0.7**2, abs=0.007)
    assert float(((first[0] == 0) == (first[1] == 0)).double().mean()) == pytest.approx(0.3**2 + 0.7**2, abs=0.01)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)


def test_nothing_is_drawn_without_dropout():
    u, weight = torch.ones(1, 2, 2, 8), torch.ones(8)
    before = torch.get_rng_state()
    gelu_response_norm(u, weight, weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_operations_gradients_are_those_of_finite_differences():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 2, 6), (6,), (6,))]
    for seed in (None, torch.tensor([7])):
        torch.autograd.gradcheck(lambda u, gamma, beta, seed=seed: _forward(u, gamma, beta, seed, 0.3)[0], inputs)


def test_torch_library_accepts_the_operations():
    case = Case((2, 3, 3, 24), torch.bfloat16, 0.1)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.u, case.gamma, case.beta)]
    torch.library.opcheck(_forward, (*inputs, case.seed, 0.1))
    with torch.no_grad():
        _, norms, mean = _forward(*inputs, case.seed, 0.1)
    torch.library.opcheck(_backward, (case.y_gradient, case.u, case.gamma, norms, mean, case.seed, 0.1))


@pytest.mark.gpu
@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_wuerstchen_on_a_gpu(dtype, probability):
    """At its size: the kernels against the reference, twice with the same bits."""
    torch.manual_seed(1)
    u, y_gradient = torch.randn(2, 2, 24, 24, 6144, device="cuda").to(dtype)
    gamma, beta = torch.randn(2, 6144, device="cuda").to(dtype)
    seed = torch.tensor([11], device="cuda") if probability else None
    results = []
    for forward, backward in (SIDES[0].values[0], SIDES[0].values[0], SIDES[1].values[0]):
        y, norms, mean = forward(u, gamma, beta, seed, probability)
        results.append((y, norms, mean, *backward(y_gradient, u, gamma, norms, mean, seed, probability)))
    for first, again, expected in zip(*results, strict=True):
        assert torch.equal(first, again)
        size = float(expected.abs().max())
        torch.testing.assert_close(first, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)


@pytest.mark.gpu
def test_replays_of_a_graph_draw_other_masks_and_the_backward_pass_the_same():
    u = torch.randn(1, 8, 8, 64, device="cuda").requires_grad_()
    gamma, beta = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda").requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = gelu_response_norm(u, gamma, beta, 0.5)
        return y, torch.autograd.grad(y.sum(), beta)[0]

    graph, (y, by_beta) = captured(step)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append((y == 0).cpu())
        assert torch.equal(by_beta, 2.0 * (y != 0).sum((0, 1, 2)))
    assert 0.4 < float((masks[0] == masks[1]).double().mean()) < 0.6
