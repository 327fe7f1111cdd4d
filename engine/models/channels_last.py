"""Convolution weights stored channels last, so that they stay so in any flat buffer.

Tensor cores read a convolution's weights as (out, height, width, in). A `memory_format` would not survive DeepSpeed, which lays
parameters out flat in logical order and would leave every forward pass to convert them. So the parameter itself has that
shape, and the convolution sees it permuted back. Activations follow: a convolution whose weights are channels-last gives
channels-last outputs.
"""

import torch
from torch import Tensor, nn


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose `weight` is stored as [out, height, width, in]."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.permute(0, 3, 1, 2), bias)


def store_channels_last(model: nn.Module) -> None:
    """Turns the weights of every convolution, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = ChannelsLastConv2d
            turned = module.weight.detach().permute(0, 2, 3, 1)
            # A clone and not .contiguous(), which leaves odd strides to dimensions of size one.
            module.weight = nn.Parameter(turned.clone(memory_format=torch.contiguous_format), module.weight.requires_grad)


def as_published(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the shapes of `model`'s parameters, by name, in the shapes of the published model."""
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ChannelsLastConv2d)}
    return {name: tensor.permute(0, 3, 1, 2).contiguous() if name in turned else tensor for name, tensor in tensors.items()}
