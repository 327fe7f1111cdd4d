"""The engine's operations, registered with `torch.library` on import: Triton on CUDA, plain torch elsewhere."""

from engine.kernels.add_noise import add_noise
from engine.kernels.diffusion_loss import diffusion_loss

__all__ = ["add_noise", "diffusion_loss"]
