"""Torch's settings, which are a process's and not a side's."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """For a side that is opened and stepped inside: torch's settings are afterwards as before, and its own at first."""
    matmul, cudnn, compiler = torch.backends.cuda.matmul, torch.backends.cudnn, torch.compiler.config
    before = matmul.allow_tf32, cudnn.benchmark, cudnn.allow_tf32, compiler.cache_key_tag
    try:
        # The engine sets the order of attention's kernels for the process; the recipe has torch's own.
        kernels = _cur_sdpa_kernel_backends(with_priority=True)
        with sdpa_kernel(kernels, set_priority=True):
            yield
    finally:
        matmul.allow_tf32, cudnn.benchmark, cudnn.allow_tf32, compiler.cache_key_tag = before


def settle_attention(device: torch.device) -> None:
    """Has torch write its own order of attention's kernels, as it does at its first choice; every side then starts from it."""
    if device.type == "cuda":
        F.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 8, 64, device=device, dtype=torch.bfloat16))
