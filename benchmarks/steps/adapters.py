"""What does a step of adapters take, against the full fine-tune and PEFT's layers? `python -m benchmarks.steps.adapters`

Counted on the meta device, nothing is measured: the forward and backward pass of one sample in bf16, of each published model in
four forms: all weights trained (`full`); adapters as PEFT adds them to diffusers' model (`peft`); in the training form with
projections apart (`apart`), and stacked (`stacked`), as runs have them. For each: parameters that are trained; operations;
kernels of matrix products and convolutions; all kernels, where none are compiled; the bytes that these read and write; and the
bytes that autograd keeps of the forward pass for the backward pass, weights aside.

Group normalisation with its activation, and attention, are one kernel each, as on a GPU.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tools.cost import FlashAttention, operations
from benchmarks.tools.published import CHECKPOINTS, trained_model, write
from engine.models import training_form
from engine.models.family import Family, open_family
from engine.models.training_form import Form, to_training_form

FORMS: dict[str, Form | None] = {"full": Form(), "peft": None, "apart": Form(projections=False), "stacked": Form()}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward"}


class _Kernels(TorchDispatchMode):
    """Counts operations that move memory, matrix products among them, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.kernels = self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if not function.is_view and name not in ("empty", "empty_like", "new_empty", "_unsafe_view", "detach", "expand"):
            number = sum(args[-1][:2]) if name == "convolution_backward" else 1  # gradients of inputs and of weights
            self.kernels += number
            self.products += number if name in PRODUCTS else 0
            self.moved += sum(tensor.nbytes for tensor in tree_leaves((args, kwargs, result)) if torch.is_tensor(tensor))
        return result


class _OneAttention(TorchFunctionMode):
    """Counts 4 operations for each pair of positions and number of a head, and twice as many for the backward pass."""

    flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args or (kwargs["query"], kwargs["key"], kwargs["value"])
        pairs = math.prod(query.shape) * key.shape[-2]
        self.flops += pairs * (12 if query.requires_grad else 4)
        return FlashAttention.apply(query, key, value)


def brought_into(form: str, model: Any, family: Family) -> Any:
    """A published model on the meta device, brought into one of `FORMS` and bf16."""
    with torch.device("meta"):
        if form == "full":
            to_training_form(model, Form())
        else:
            family.lay_out(model, FORMS[form])
    return model.train().to(torch.bfloat16)


def count(family: Family, model: Any) -> dict[str, int]:
    """What a forward and a backward pass of one sample take."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # by storage, which lives as long as its tensor

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    encoding = family.encoding
    fields = encoding.record_spec | encoding.text_fields
    timesteps = family.schedule.draw(torch.tensor([0]), torch.arange(1), 1).to("meta")
    timesteps = timesteps.bfloat16() if timesteps.is_floating_point() else timesteps  # the published form knows no other
    with torch.device("meta"):
        record = {name: torch.empty(1, *field.shape, dtype=field.dtype) for name, field in fields.items()}
        record = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in record.items()}
    kernels, attention = _Kernels(), _OneAttention()
    with torch.device("meta"), operations() as counter, kernels:
        with attention, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prediction = family.predict(model, record[encoding.mean], timesteps, record)
        torch.autograd.grad(prediction, trained, torch.empty_like(prediction), materialize_grads=True)
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "flops": counter.get_total_flops() + attention.flops,
        "products": kernels.products,
        "kernels": kernels.kernels,
        "moved_bytes": kernels.moved,
        "kept_bytes": sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own),
    }


def count_all(family: Family, published: Callable[[], Any]) -> list[dict[str, Any]]:
    """What each form takes.

    Args:
        published: builds the published model.
    """
    norms = training_form.fuses
    training_form.fuses = lambda module, x: True
    try:
        with torch.device("meta"):
            models = {form: published() for form in FORMS}
        return [{"form": form, **count(family, brought_into(form, model, family))} for form, model in models.items()]
    finally:
        training_form.fuses = norms


def rows_of(checkpoint: str, rank: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        family = open_family(write(checkpoint, Path(directory), lora_rank=rank))
    return [{"checkpoint": checkpoint, **row} for row in count_all(family, partial(trained_model, checkpoint))]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | form | trained, M | TFLOP | matrix products | kernels | GB moved | MB kept |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['checkpoint']} | {row['form']} | {row['trained'] / 1e6:.2f} | {row['flops'] / 1e12:.3f} | "
            f"{row['products']} | {row['kernels']} | {row['moved_bytes'] / 1e9:.2f} | {row['kept_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.steps.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=4, help="of the adapters (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = [row for checkpoint in CHECKPOINTS for row in rows_of(checkpoint, options.rank)]
    print(json.dumps(rows) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
