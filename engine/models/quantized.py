"""A frozen base in 8 or 4 bits: linear layers whose weights are codes and scales, and are made anew for each product.

int8 and fp8 (e4m3) have a scale for each row; nf4 (arXiv:2305.14314) one for each 64 elements, by bitsandbytes. Autograd keeps
the codes alone, not the weights that it multiplied with. Convolutions, norms and what has one row for each sample stay as they
are.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.options import TrainConfig
from engine.errors import UserError

BLOCK = 64  # elements that share a scale in nf4
LARGEST = {"int8": 127.0, "fp8": 448.0}  # that a code stands for
# Of the layers that make nearly all of a model's matrix products.
_QUANTIZED = re.compile(r"(^|\.)(attn\d*|attentions?|ff|channelwise|proj_in|proj_out)(\.|$)")


class QuantizedLinear(nn.Module):
    """A frozen linear layer, of which codes are kept; these and scales are integers, which no change of precision touches."""

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, precision: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.precision = layer.in_features, layer.out_features, precision
        codes, scales = quantize(layer.weight.detach().float(), precision)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales.view(torch.int32), persistent=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self.codes, self.scales, self.bias, self.precision, self.out_features)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in]."""
        return dequantize(self.codes, self.scales, self.precision, (self.out_features, self.in_features), dtype)


class FrozenProduct(torch.autograd.Function):
    """A product with weights of codes, which the backward pass makes again."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, precision: str, outputs: int) -> Tensor:
        return F.linear(x, dequantize(codes, scales, precision, (outputs, x.shape[-1]), x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, codes, scales, _, ctx.precision, outputs = inputs
        ctx.save_for_backward(codes, scales)
        ctx.shape = (outputs, x.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        codes, scales = ctx.saved_tensors
        return gradient @ dequantize(codes, scales, ctx.precision, ctx.shape, gradient.dtype), *(None,) * 5


def quantize(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Codes (int8, or uint8 that hold e4m3 or two of nf4) and scales, fp32, of weights [out, in] in fp32."""
    if precision == "nf4":
        import bitsandbytes  # noqa: F401 (which registers the operation)

        return torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    scales = (weight.abs().amax(1, keepdim=True) / LARGEST[precision]).clamp(min=torch.finfo(torch.float32).tiny)
    if precision == "int8":
        return (weight / scales).round().to(torch.int8), scales
    return (weight / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, precision: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Weights [out, in]; `scales` are fp32 numbers seen as int32."""
    scales = scales.view(torch.float32)
    if precision == "nf4":
        return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
    values = codes if precision == "int8" else codes.view(torch.float8_e4m3fn)
    return (values.float() * scales).to(dtype)


def quantize_base(model: nn.Module, config: TrainConfig) -> None:
    """Replaces the frozen linear layers of a model in training form, in place.

    Raises:
        UserError: the GPU cannot compile what reads the precision.
    """
    precision = str(config.base_precision)
    if precision == "fp8" and config.compile and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(
            f"--base_precision fp8 with --compile needs a GPU of the Ada generation or newer ({torch.cuda.get_device_name()}); "
            "use int8"
        )
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not module.weight.requires_grad and _QUANTIZED.search(name):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, QuantizedLinear(module, precision))
