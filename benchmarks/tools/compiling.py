"""torch.compile where it would take minutes."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def compiling_cheaply() -> Iterator[None]:
    """Models compiled inside are traced and no more: inductor takes minutes for a UNet on a CPU."""
    if not hasattr(torch.compiler, "set_default_backend"):  # before torch 2.13: not traced either
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    torch.compiler.set_default_backend("eager")
    try:
        yield
    finally:
        torch.compiler.set_default_backend(None)
