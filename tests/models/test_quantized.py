"""A frozen base in 8 and 4 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.catalogue import FAMILIES
from engine.models.lora import AdaptedLinear, add_adapters
from engine.models.quantized import QuantizedLinear, quantize_base
from engine.models.training_form import SHIPPED, to_training_form
from tests.models.test_lora import load, options

# Of weights drawn from a normal distribution, the error's deviation relative to theirs.
ERRORS = {"int8": 0.01, "fp8": 0.03, "nf4": 0.1}


@pytest.mark.parametrize("precision", ERRORS)
def test_products_are_those_of_the_rounded_weights_and_keep_only_codes(precision):
    torch.manual_seed(0)
    plain = nn.Linear(128, 96).requires_grad_(False)
    nn.init.normal_(plain.weight)
    layer = QuantizedLinear(plain, precision).to(torch.bfloat16).to(torch.float32)
    weight = layer.dequantized(torch.float32)
    assert 0 < float((weight - plain.weight).std()) < ERRORS[precision]
    x, kept = torch.randn(5, 128, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = layer(x)
    torch.testing.assert_close(output, F.linear(x, weight, layer.bias))
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], weight.sum(0).expand(5, -1))
    assert {tensor.data_ptr() for tensor in kept} == {layer.codes.data_ptr(), layer.scales.data_ptr()}
    assert layer.codes.nbytes == 128 * 96 * (0.5 if precision == "nf4" else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_linear_layers_of_blocks_are_quantized_and_adapters_are_not(family, model, published):
    trained, config = load(family, model, published), options(family, base_precision="int8", mixed_precision="bf16")
    add_adapters(trained, FAMILIES[family].part, config, seed=0)
    to_training_form(trained, SHIPPED)
    quantize_base(trained, config)
    adapted = [module for module in trained.modules() if isinstance(module, AdaptedLinear)]
    assert adapted
    assert all(isinstance(module.base_layer, QuantizedLinear) for module in adapted)
    left = [name for name, module in trained.named_modules() if type(module) is nn.Linear]
    assert not [name for name in left if "attn" in name or "attention" in name or ".ff." in name]
