"""engine::short_attention: kernels and reference against torch's math attention in double precision."""

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import short_attention
from engine.kernels.short_attention import (
    _backward,
    _forward,
    fits,
    launch_short_attention,
    launch_short_attention_backward,
    pays_on,
    reference_short_attention,
    reference_short_attention_backward,
    widened,
)
from tests.kernels.cases import DEVICE, captured, run_kernels

SIDES = [
    pytest.param((launch_short_attention, launch_short_attention_backward), id="triton", marks=run_kernels),
    pytest.param((reference_short_attention, reference_short_attention_backward), id="reference"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# A GPU multiplies fp32 in TF32; Triton's interpreter multiplies the bits of bf16 as if they were numbers.
DTYPES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32, torch.float16]


def mask_of(kind: str, batch: int, tokens: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask that is causal and hides the last tokens of a sample, as the Kandinsky prior's, or of another shape."""
    causal = torch.full((tokens, tokens), -10000.0).triu(1)
    if kind == "none":
        return None
    if kind == "one for all":
        return causal.expand(batch, 1, tokens, tokens).to(DEVICE, dtype)
    hidden = (torch.arange(tokens) >= tokens - 3 - torch.arange(batch)[:, None]) * -10000.0
    if kind == "of keys":
        return hidden[:, None, None].to(DEVICE, dtype)
    mask = (causal + hidden[:, None]).to(DEVICE, dtype)
    mask[0, 1] = -torch.inf if kind == "a row of -inf" else -10000.0
    return mask.repeat_interleave(2, 0).view(batch, 2, tokens, tokens)[:, :1]


class Case:
    """Inputs, and results in double precision by torch's attention."""

    def __init__(self, tokens, size, kind, dtype, batch=2, heads=3) -> None:
        generator = torch.Generator().manual_seed(tokens + size)
        self.heads = heads
        self.projected = (1.5 * torch.randn(batch, tokens, 3 * heads * size, generator=generator)).to(DEVICE, dtype)
        self.y_gradient = torch.randn(batch, tokens, heads * size, generator=generator).to(DEVICE, dtype)
        self.mask = mask_of(kind, batch, tokens, dtype)
        exact = self.projected.cpu().double().requires_grad_()
        query, key, value = exact.unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4).unbind()
        mask = None if self.mask is None else self.mask.cpu().double()
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        y.backward(self.y_gradient.cpu().double())
        self.results = y.detach(), exact.grad

    def check(self, side) -> None:
        mask = None if self.mask is None else widened(self.mask)
        y = side[0](self.projected, mask, self.heads)
        found = side[1](self.y_gradient, self.projected, mask, self.heads)
        for result, exact in zip((y, found), self.results, strict=True):
            assert result.dtype == self.projected.dtype
            assert result.is_contiguous()
            # Of scores that are all -10000 fp32 keeps 2^-11.
            tolerance = max(TOLERANCE[result.dtype], 4e-3 * (self.mask is not None))
            size = float(exact.abs().max())
            torch.testing.assert_close(result.cpu().double(), exact, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "size", "kind"),
    [
        (81, 64, "of samples"), (81, 64, "none"), (81, 64, "a row of -inf"), (81, 32, "one for all"), (128, 64, "of samples"),
        (128, 80, "none"), (64, 64, "none"), (64, 32, "of keys"), (17, 80, "of samples"), (17, 16, "none"), (97, 48, "of keys"),
    ],
)  # fmt: skip
def test_results_are_those_of_double_precision(side, dtype, tokens, size, kind):
    Case(tokens, size, kind, dtype).check(side)


@run_kernels
def test_other_memory_is_copied():
    case = Case(17, 32, "none", DTYPES[-1])
    case.projected = torch.cat([case.projected, case.projected], -1)[..., : case.projected.shape[-1]]
    case.y_gradient = case.y_gradient.transpose(0, 1).contiguous().transpose(0, 1)
    case.check((launch_short_attention, launch_short_attention_backward))


def test_what_fits():
    assert fits(81, 64, torch.bfloat16, None)
    assert fits(128, 128, torch.float16, None)
    assert not fits(129, 64, torch.bfloat16, None)
    assert not any(fits(81, size, torch.bfloat16, None) for size in (8, 40, 144, 160))
    assert not fits(81, 64, torch.float32, None)
    assert fits(81, 64, torch.bfloat16, torch.zeros(2, 1, 1, 81))
    others = torch.zeros(2, 1, 81, requires_grad=True), torch.ones(2, 1, 81, dtype=torch.bool), torch.zeros(2, 1, 80)
    assert not any(fits(81, 64, torch.bfloat16, mask) for mask in others)


@pytest.mark.parametrize(
    ("device", "capability", "hip", "expected"),
    [
        ("cuda", (9, 0), None, True), ("cuda", (10, 0), None, True), ("cuda", (8, 0), None, False),
        ("cuda", (7, 5), None, False), ("cuda", (12, 0), None, False), ("cuda", (9, 4), "6.4", False),
        ("cpu", (9, 0), None, False),
    ],
)  # fmt: skip
def test_which_gpus_it_pays_on(device, capability, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert pays_on(torch.device(device)) == expected


def test_the_operations_gradients_are_those_of_finite_differences():
    projected = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    for kind in ("none", "one for all"):
        mask = mask_of(kind, 2, 5, torch.float64)
        mask = None if mask is None else mask.cpu()
        torch.autograd.gradcheck(lambda projected, mask=mask: short_attention(projected, mask, 2), [projected])


@pytest.mark.parametrize("kind", ["none", "of samples"])
def test_torch_library_accepts_the_operations(kind):
    case = Case(9, 16, kind, torch.bfloat16)
    mask = None if case.mask is None else widened(case.mask)
    torch.library.opcheck(_forward, (case.projected.clone().requires_grad_(), mask, case.heads))
    torch.library.opcheck(_backward, (case.y_gradient, case.projected, mask, case.heads))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "size", "kind"), [(81, 64, "of samples"), (64, 64, "none"), (128, 64, "of keys"), (77, 128, "none")]
)
def test_attention_on_a_gpu_is_torchs_twice_with_the_same_bits(dtype, tokens, size, kind):
    """At the size of the Kandinsky prior, against attention in fp32."""
    torch.manual_seed(1)
    heads = 32
    projected = torch.randn(16, tokens, 3 * heads * size, device="cuda").to(dtype).requires_grad_()
    mask, upstream = mask_of(kind, 16, tokens, dtype), torch.randn(16, tokens, heads * size, device="cuda").to(dtype)
    first, again = (
        (y.detach(), *torch.autograd.grad(y, projected, upstream))
        for y in (short_attention(projected, mask, heads) for _ in range(2))
    )
    wide = projected.detach().float().requires_grad_()
    query, key, value = wide.unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4).unbind()
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask.float())
    y = y.transpose(1, 2).flatten(2)
    for result, same, exact in zip(first, again, (y.detach(), *torch.autograd.grad(y, wide, upstream.float())), strict=True):
        assert torch.equal(result, same)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(result.float(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


@pytest.mark.gpu
def test_compiled_layers_are_replayed_from_a_graph():
    projected = torch.randn(4, 81, 3 * 32 * 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    mask = mask_of("of samples", 4, 81, torch.bfloat16)

    def layers(projected: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        first = short_attention(projected, mask, 32)
        return short_attention(torch.cat([first] * 3, -1), mask, 32)

    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True)
    graph, (found,) = captured(lambda: torch.autograd.grad(compiled(projected, mask).sum(), projected))
    graph.replay()
    (expected,) = torch.autograd.grad(layers(projected, mask).sum(), projected)
    # Eager code rounds twice where it adds the three gradients of what was joined.
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[found.dtype], atol=2 * TOLERANCE[found.dtype] * size)
