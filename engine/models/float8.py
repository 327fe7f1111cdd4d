"""Matrix products in fp8, by torchao's float8 training: weights, gradients and everything that is kept stay as they are.

Inputs and weights are cast to e4m3, gradients of outputs to e5m2, each with one scale from the largest magnitude of that very
tensor; sums are fp32. Scales never leave the device, so that a step can be captured.
"""

from typing import Any

import torch
from torch import nn

from engine.errors import UserError

MULTIPLE = 16  # of the dimensions of an fp8 product: both features of a layer, and the rows, which a batch of multiples gives
BLOCKS = ("transformer_blocks.", "blocks.")  # what repeats; the projections before and after them stay in bf16


def in_float8(module: nn.Module, name: str) -> bool:
    """Whether a linear layer is computed in fp8; not the `mapper` of a timestep, which has one row for each sample."""
    features = (module.in_features, module.out_features)
    fits = all(isinstance(number, int) and number % MULTIPLE == 0 for number in features)
    return fits and name.startswith(BLOCKS) and not name.endswith(".mapper")


def convert(model: Any, emulate: bool = False) -> None:
    """Changes the linear layers of a model's blocks in place; names and parameters stay.

    Args:
        emulate: round as fp8 does and multiply in the precision of the weights, on any device.

    Raises:
        UserError: there is no GPU of compute capability 9 or more.
    """
    if not emulate and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0)):
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "there is no GPU"
        raise UserError(f"--matrix_precision fp8 needs a GPU of the Hopper generation or newer ({card}); leave it out")
    # Takes seconds to import.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model, module_filter_fn=in_float8, config=Float8LinearConfig(emulate=emulate))
