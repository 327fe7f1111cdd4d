"""Every Triton kernel is launched on the device of its arguments."""

import contextlib

import pytest
import torch

from engine.kernels import adamw_ema_, add_noise, diffusion_loss, lion_ema_, square_sum
from engine.kernels.gelu import _backward as gelu_backward
from engine.kernels.gelu import _forward as gelu
from engine.kernels.gelu_response_norm import _backward as response_backward
from engine.kernels.gelu_response_norm import _forward as response_forward
from engine.kernels.group_norm_silu import _backward, _forward
from engine.kernels.short_attention import _backward as attention_backward
from engine.kernels.short_attention import _forward as attention
from tests.kernels.cases import run_kernels


def arguments_of(name: str, device: str) -> tuple:
    """An operation, and small arguments for it on a device."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    seed, slots = torch.tensor([5], device=device), torch.tensor([7, 8], device=device)
    sample, coefficients, flat = random(2, 4, 8, 8), random(5, 2), [random(64) for _ in range(4)]
    x, affine, statistic = random(2, 8, 4, 4), random(2, 8), random(2, 4)
    u, gamma, norms, mean = random(2, 4, 4, 8), random(8), random(2, 8), random(2)
    projected = random(2, 5, 96)
    return {
        "add_noise": (add_noise, sample, None, coefficients, seed, slots, 0.0, 0.0),
        "diffusion_loss": (diffusion_loss, sample, sample.clone(), None, coefficients, seed, slots, 0.0, random(1)),
        "adamw_ema_": (
            adamw_ema_, *flat, None, None, random(1), random(1), random(1), random(1), 0.9, 0.999, 1e-8, 0.0,
        ),
        "lion_ema_": (lion_ema_, *flat[:3], None, None, random(1), random(1), random(1), random(1), 0.9, 0.99, 0.0),
        "square_sum": (square_sum, flat[0]),
        "gelu": (gelu, x, True),
        "gelu_backward": (gelu_backward, x[..., :2].contiguous(), x, True),
        "group_norm_silu": (_forward, x, affine, affine.clone(), 4, 1e-5, True),
        "group_norm_silu_backward": (_backward, x, x.clone(), affine, affine.clone(), statistic, statistic.clone(), 4, True),
        "gelu_response_norm": (response_forward, u, gamma, gamma.clone(), seed, 0.1),
        "gelu_response_norm_backward": (response_backward, u, u.clone(), gamma, norms, mean, seed, 0.1),
        "short_attention": (attention, projected, None, 2),
        "short_attention_backward": (attention_backward, projected[..., :32].contiguous(), projected, None, 2),
    }[name]  # fmt: skip


OPERATIONS = [
    "add_noise", "diffusion_loss", "adamw_ema_", "lion_ema_", "square_sum", "gelu", "gelu_backward", "group_norm_silu",
    "group_norm_silu_backward", "gelu_response_norm", "gelu_response_norm_backward", "short_attention",
    "short_attention_backward",
]  # fmt: skip


def test_every_operation_of_ours_is_among_them():
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name[:8] == "engine::"}
    assert registered == set(OPERATIONS)


@run_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU shows is tested below")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_launch_is_guarded_by_the_device_of_the_first_tensor(name, monkeypatch):
    guarding: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: guarding.append(tensor) or contextlib.nullcontext())
    operation, *arguments = arguments_of(name, "cpu")
    operation._backend_fns["cuda"](*arguments)
    assert [id(tensor) for tensor in guarding] == [id(arguments[0])]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_launch_for_another_device_than_the_current_one(name):
    results = []
    for device in ("cuda:0", "cuda:1"):
        operation, *arguments = arguments_of(name, device)
        returned = operation(*arguments)
        torch.cuda.synchronize(device)
        written = [*arguments, *(returned if isinstance(returned, tuple) else [returned])]
        results.append([tensor.cpu() for tensor in written if torch.is_tensor(tensor)])
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
