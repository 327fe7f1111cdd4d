"""How large is each family at full size, and what must a step cost? `python -m benchmarks.sizes`

Counted on the meta device, nothing is measured: parameters; operations of the trained model (attention included; training is
three times the forward pass); the bytes of a latent shard's record in bf16; and the bytes that a step must move if everything
between matrix products, convolutions and attention were fused into them:

- per sample, three times what those operations read and write besides weights in a forward pass, 2 bytes per number;
- per step and parameter, 48 bytes (`STEP_BYTES`): 6 for the weights (two readings and the gradient's writing), 4 for laying the
  gradient out flat, and 38 for the optimizer (the norm's reading of the gradient, and its pass of 36).

The time floors are for a card of `--tflops` and `--terabytes` per second; the defaults are assumed for an H200, not measured.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.published import CHECKPOINTS, trained_model, write
from engine.loop.metrics import forward_flops, forward_on_meta
from engine.models.family import Family, open_family

STEP_BYTES = 48  # per parameter: weights 2 + 2, gradient 2, its copy to the flat buffer 4, norm 2, AdamW with its average 36
_MATRIX_OPERATIONS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"}


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
    """Adds up the numbers that matrix products, convolutions and attention read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def add(self, *tensors: Any) -> None:
        self.numbers += sum(tensor.numel() for tensor in tree_leaves(tensors) if torch.is_tensor(tensor))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name in _MATRIX_OPERATIONS:
            self.add(args, result)
        return result


def count(family: Family, model: Any) -> Cost:
    """Counts a family's model by a forward pass of one sample on the meta device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    traffic = _Traffic()

    def attention(query, key, value, **unused):
        # One operation that keeps its scores to itself.
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        traffic.add(query, key, value, result)
        return result

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention), traffic:
        forward_on_meta(family, model)
    return Cost(3 * forward_flops(family, model), 3 * 2 * (traffic.numbers - parameters), parameters)


def measure(checkpoint: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        family = open_family(write(checkpoint, Path(directory)))
        fields = family.record_spec.values()
    with torch.device("meta"):
        model = trained_model(checkpoint)
    cost = count(family, model)
    return {
        "checkpoint": checkpoint,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
        "forward_flops": cost.training_flops / 3,
        "image_bytes": sum(field.row_bytes for field in fields if field.per == "image"),
        "caption_bytes": sum(field.row_bytes for field in fields if field.per == "caption"),
        "sample_bytes": cost.sample_bytes,
        "constant_bytes": cost.constant_bytes,
    }


def table(rows: list[dict[str, Any]], flops: float, bandwidth: float) -> str:
    """Two Markdown tables: sizes, and the floors of a step's time."""
    lines = ["| model | parameters | training TFLOP per sample | KiB per image | KiB per caption | GiB per million |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        total = row["image_bytes"] + row["caption_bytes"]
        lines.append(
            f"| {row['checkpoint']} | {row['parameters'] / 1e6:.1f} M | {3 * row['forward_flops'] / 1e12:.3f} | "
            f"{row['image_bytes'] / 2**10:.1f} | {row['caption_bytes'] / 2**10:.1f} | {total * 1e6 / 2**30:.1f} |"
        )
    lines += ["", "| model | MiB per sample | GB per step | operations, ms per sample | bytes, ms per sample | "
              "bytes, ms per step | operations per byte at batch 32 |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        operations, sample, constant = 3 * row["forward_flops"], row["sample_bytes"], row["constant_bytes"]
        lines.append(
            f"| {row['checkpoint']} | {sample / 2**20:.0f} | {constant / 1e9:.1f} | {operations / flops * 1e3:.2f} | "
            f"{sample / bandwidth * 1e3:.2f} | {constant / bandwidth * 1e3:.1f} | "
            f"{32 * operations / (32 * sample + constant):.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.sizes", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--tflops", type=float, default=788, help="of a bf16 matrix product (default: %(default)s)")
    parser.add_argument("--terabytes", type=float, default=4.3, help="per second of a copy (default: %(default)s)")
    options = parser.parse_args()
    rows = [measure(checkpoint) for checkpoint in CHECKPOINTS]
    print(json.dumps(rows) if options.json else table(rows, options.tflops * 1e12, options.terabytes * 1e12))
    return 0


if __name__ == "__main__":
    sys.exit(main())
