"""torch.compile where it would take minutes."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def compiling_cheaply() -> Iterator[None]:
    """Models compiled inside are traced and no more: inductor takes minutes for a UNet on a CPU."""
    torch.compiler.set_default_backend("eager")
    try:
        yield
    finally:
        torch.compiler.set_default_backend(None)
