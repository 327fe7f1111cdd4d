"""Which kernel of scaled dot product attention runs: chosen by a rule, tried on every shape of the model, and named.

torch takes the first kernel in an order of its own that accepts a shape, when it runs a model as well as when it traces one
for torch.compile. So the order is all that must be set, once for the process: training, the recomputation of checkpointed
blocks and captured graphs agree; shapes that are not trained (a VAE's heads of 512, in validation images) go to the first
kernel that takes them.

Attention within few tokens is ours (engine::short_attention) on Hopper and on Blackwell in data centres, under `auto`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _sdpa_kernel
from torch.overrides import TorchFunctionMode

from engine.config.options import TrainConfig
from engine.errors import UserError, first_line
from engine.kernels.short_attention import fits
from engine.loop.flops import forward_on_meta
from engine.messages import say
from engine.models.family import Family
from engine.models.training_form import let_be_short

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = {kernel: name for name, kernel in KERNELS.items()}
# 9.15.1: before it the backward pass is broken at lengths that are no multiple of 128, which no trial run shows. torch's wheels
# for CUDA 12 bring such a cuDNN, and torch itself then leaves it out (pytorch/pytorch#169849).
CUDNN_SOUND = 91501


def order_of(wanted: str, capability: tuple[int, int] | None, cudnn: int | None) -> list[str]:
    """Names of the kernels in the order in which torch shall try them.

    The rule of `auto`: cuDNN's first on compute capability 9 and 10 (Hopper, and Blackwell in data centres), whose matrix units
    Flash 2 was not written for; elsewhere, and before `CUDNN_SOUND`, Flash first. torch knows what each accepts: cuDNN heads of
    multiples of 8 up to 128 or 256, by its version, with or without a mask; Flash heads up to 256 without a mask; both in bf16
    and fp16 alone. Memory-efficient attention takes fp32 and masks too, and math takes everything.

    Args:
        wanted: auto, or the kernel to put first.
        capability: of the GPU; None without one.
        cudnn: cuDNN's version as a number, 91900 for 9.19.0; None without it.
    """
    cudnn_first = capability is not None and capability[0] in (9, 10) and cudnn is not None and cudnn >= CUDNN_SOUND
    first = wanted if wanted in KERNELS else "cudnn" if cudnn_first else "flash"
    return [first, *(name for name in ("flash", "efficient", "math") if name != first)]


@dataclass(frozen=True)
class Call:
    """What attention is called with: shape and strides of queries, keys and values [B, heads, N, head size], and of a mask.

    adds: the mask is added to the scores; else it is one of booleans.
    """

    query: tuple[torch.Size, tuple[int, ...]]
    key: tuple[torch.Size, tuple[int, ...]]
    value: tuple[torch.Size, tuple[int, ...]]
    mask: tuple[torch.Size, tuple[int, ...]] | None
    adds: bool = True

    def __str__(self) -> str:
        masked = " under a mask" if self.mask else ""
        return f"queries {list(self.query[0])} with keys {list(self.key[0])}{masked}"

    def is_short(self, dtype: torch.dtype) -> bool:
        """Whether it is attention within one stacked projection, which our kernel takes."""
        (_, heads, tokens, size), _ = self.query
        stacked = (3 * tokens * heads * size, size, 3 * heads * size, 1)
        alike = self.query == self.key == self.value
        *_, mask = self.tensors(dtype, torch.device("meta"))
        return alike and self.query[1] == stacked and fits(tokens, size, dtype, mask)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Arguments of this layout, all zero, that require gradients where the model's do."""
        query, key, value = (
            torch.empty_strided(*layout, dtype=dtype, device=device).zero_().requires_grad_()
            for layout in (self.query, self.key, self.value)
        )
        mask_dtype = dtype if self.adds else torch.bool
        mask = torch.empty_strided(*self.mask, dtype=mask_dtype, device=device).zero_() if self.mask else None
        return query, key, value, mask

    def choice(self, dtype: torch.dtype, device: torch.device) -> str:
        """The kernel that torch takes."""
        return NAMES[SDPBackend(torch._fused_sdp_choice(*self.tensors(dtype, device)))]

    def problem(self, dtype: torch.dtype, device: torch.device) -> str:
        """Why it fails when it is run forward and backward, with a gradient as the output's projection gives it; or nothing."""
        query, key, value, mask = self.tensors(dtype, device)
        try:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
            torch.autograd.grad(attended, (query, key, value), torch.zeros_like(attended))
        except RuntimeError as error:
            return first_line(error)
        return ""


class Calls(TorchFunctionMode):
    """Collects the distinct calls of attention, in the order of the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, None] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask")
            query, key, value = ((tensor.shape, tensor.stride()) for tensor in args)
            masked = None if mask is None else (mask.shape, mask.stride())
            self.calls[Call(query, key, value, masked, mask is None or mask.is_floating_point())] = None
        return function(*args, **kwargs)


def calls_of(family: Family, model: Any, batch: int) -> list[Call]:
    """The distinct calls of attention in a training step of the model on `batch` samples."""
    with Calls() as mode, torch.no_grad():
        forward_on_meta(family, model, batch, training_form=True)
    return list(mode.calls)


def choose(wanted: str, calls: list[Call], dtype: torch.dtype, device: torch.device) -> dict[Call, str]:
    """Sets the order of kernels for the process; returns the kernel that each call takes, after it has run there once.

    Raises:
        UserError: the kernel that `wanted` names cannot run a call.
    """
    gpu = device.type == "cuda"
    order = order_of(wanted, torch.cuda.get_device_capability(device) if gpu else None, torch.backends.cudnn.version())
    for call in calls[:1]:
        # At its first choice torch writes an order of its own over any that was set before.
        call.choice(dtype, device)
    while True:
        set_order(order)
        kernels = {call: call.choice(dtype, device) for call in calls}
        problems = {call: call.problem(dtype, device) for call in calls}
        broken = [call for call in calls if problems[call] or (wanted in KERNELS and kernels[call] != wanted)]
        if not broken:
            return kernels
        first = broken[0]
        if wanted in KERNELS or kernels[first] == order[-1]:
            precision = str(dtype).removeprefix("torch.")
            card = torch.cuda.get_device_name(device) if gpu else "the CPU"
            why = f" ({problems[first]})" if problems[first] else ""
            raise UserError(
                f"--attention {wanted}: cannot run {first} in {precision} on {card}{why}; choose another, or leave it out"
            )
        order.remove(kernels[first])


def prepare(config: TrainConfig, family: Family, model: Any, device: torch.device, loud: bool) -> None:
    """Chooses the kernels of attention for training a freshly loaded model; `loud` says which each shape takes.

    Raises:
        UserError: `--attention` names one that does not run here.
    """
    if config.uses_xformers:
        return
    if device.type != "cuda":
        if config.attention != "auto":
            raise UserError(f"--attention {config.attention}: there is no GPU; leave it out")
        return
    calls = calls_of(family, model, config.train_batch_size)
    kernels = choose(config.attention, calls, family.encoding.dtype, device)
    if config.attention == "auto" and let_be_short(model, device):
        kernels |= {call: "engine" for call in calls if call.is_short(family.encoding.dtype)}
    if loud:
        # Calls of one shape may differ in their strides.
        for line in dict.fromkeys(f"Attention of {call}: {kernel}" for call, kernel in kernels.items()):
            say(line)


def set_order(order: list[str]) -> None:
    """Makes torch take the first of these kernels that accepts a shape, until further notice."""
    # What the context `sdpa_kernel` sets, without its end.
    _sdpa_kernel([KERNELS[name] for name in order], set_priority=True)
    # Compiled code contains the kernels that were chosen when it was traced, and its caches do not know the order.
    torch.compiler.config.cache_key_tag = f"attention: {', '.join(order)}"
