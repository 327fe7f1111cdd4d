"""The engine's operations, registered with `torch.library` on import: Triton on CUDA, C++ or plain torch on the CPU."""

from engine.kernels.adamw_ema import adamw_ema_, lion_ema_
from engine.kernels.add_noise import add_noise
from engine.kernels.diffusion_loss import diffusion_loss
from engine.kernels.gelu import geglu, gelu
from engine.kernels.gelu_response_norm import gelu_response_norm
from engine.kernels.group_norm_silu import group_norm_silu
from engine.kernels.short_attention import short_attention
from engine.kernels.square_sum import square_sum

__all__ = [
    "adamw_ema_", "add_noise", "diffusion_loss", "geglu", "gelu", "gelu_response_norm", "group_norm_silu", "lion_ema_",
    "short_attention", "square_sum",
]  # fmt: skip
