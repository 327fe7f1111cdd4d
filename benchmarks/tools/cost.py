"""What training must cost, counted on the meta device: nothing is measured.

Per sample, the operations of the trained model (attention included; training is three times the forward pass), and three times
what matrix products, convolutions and attention read and write besides weights in a forward pass, 2 bytes per number. Per step
and parameter, `STEP_BYTES`.
"""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from benchmarks.tools.published import trained_model, write
from engine.loop.flops import forward_flops, forward_on_meta, text_flops
from engine.models.family import Family, open_family

STEP_BYTES = 48  # per parameter: weights 2 + 2, gradient 2, its copy to the flat buffer 4, norm 2, AdamW with its average 36
MATRIX_OPERATIONS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"}


@dataclass(frozen=True)
class Cost:
    """What training must cost: operations of a sample, its bytes, and the bytes of a step whatever its batch."""

    training_flops: float
    sample_bytes: float
    parameters: int

    @property
    def constant_bytes(self) -> int:
        return STEP_BYTES * self.parameters

    def bytes_per_step(self, batch: int) -> float:
        return batch * self.sample_bytes + self.constant_bytes


class _Traffic(TorchDispatchMode):
    """Adds up the numbers that matrix products and convolutions read and write, and what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def add(self, *tensors: Any) -> None:
        self.numbers += sum(tensor.numel() for tensor in tree_leaves(tensors) if torch.is_tensor(tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name in MATRIX_OPERATIONS:
            self.add(args, result)
        return result


class OneAttention(TorchFunctionMode):
    """Makes attention one operation that keeps its scores to itself, and adds what it reads and writes to the traffic."""

    def __init__(self, traffic: Any) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args or (kwargs["query"], kwargs["key"], kwargs["value"])
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        self.traffic.add(query, key, value, result)
        return result


class FlashAttention(torch.autograd.Function):
    """Attention that computes nothing and keeps what a Flash kernel keeps: its inputs and output, and a number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def operations() -> FlopCounterMode:
    """torch's counter of operations, which forgets groups in the backward pass of a convolution, mended."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward_flops})


def _backward_flops(gradient: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Each gradient takes as many operations as the forward pass."""
    transposed, _, _, wanted = rest[-4:]
    return conv_flop_count(x, weight, gradient, transposed) * sum(wanted[:2])


def count(family: Family, model: Any) -> Cost:
    """Counts a family's model by a forward pass of one sample on the meta device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    traffic = _Traffic()
    with OneAttention(traffic), traffic:
        forward_on_meta(family, model)
    return Cost(3 * forward_flops(family, model), 3 * 2 * (traffic.numbers - parameters), parameters)


@functools.cache
def sizes_of(checkpoint: str) -> dict[str, Any]:
    """Parameters, operations, and bytes of records and steps of a published checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        family = open_family(write(checkpoint, Path(directory)))
    encoding = family.encoding
    fields = encoding.record_spec.values()
    tokens = encoding.token_fields.values() if encoding.captioned else ()
    with torch.device("meta"):
        model = trained_model(checkpoint)
    cost = count(family, model)
    return {
        "checkpoint": checkpoint,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
        "modules": sum(1 for module in model.modules() if sum(1 for _ in module.parameters(recurse=False))),
        "forward_flops": cost.training_flops / 3,
        "image_bytes": sum(field.row_bytes for field in fields if field.per == "image"),
        "caption_bytes": sum(field.row_bytes for field in fields if field.per == "caption"),
        "token_bytes": sum(field.row_bytes for field in tokens),
        "text_flops": text_flops(encoding) if encoding.captioned else 0.0,
        "sample_bytes": cost.sample_bytes,
        "constant_bytes": cost.constant_bytes,
    }


def payload(stage: int, parameters: int, bytes_per_number: int = 2) -> dict[str, int]:
    """Bytes that a step hands to collectives, by what they are for, whatever the number of processes.

    Stages 1 and 2 reduce every gradient (all-reduce it, and keep a part) and gather every updated weight once; stage 3 gathers
    them for the forward pass and again for the backward pass (DeepSpeed's defaults keep up to 1e9 parameters in between: a
    model that fits is gathered once, and frees nothing).
    """
    whole = parameters * bytes_per_number
    return {"reduced": whole, "gathered": 2 * whole if stage == 3 else whole}
