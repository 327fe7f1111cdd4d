"""Which kernel of attention is fastest at the shapes of the families? `python -m benchmarks.operations.attention`

Every distinct call of a training step, found as the engine finds it, with the strides that it has there, in each kernel of
torch, and in the engine's own (`engine`) where they are of few tokens within one projection, whose gradient torch's leave to be
stacked; forward, and forward and backward together. Heads of 40 are also padded to 64 (the padding counts). On a GPU the
published checkpoints in bf16; on a CPU the tiny ones in fp32, to try the benchmark itself.

Predicted, on Hopper: cuDNN 1.7 to 2.3 times as fast as Flash.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.tools.published import CHECKPOINTS, TINY, open_tiny, trained_model, write
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.timing import LARGE, LAUNCHES, Work, microseconds
from engine.kernels import short_attention
from engine.loop.attention import KERNELS, Call, calls_of
from engine.models.family import open_family
from engine.models.training_form import SHIPPED, to_training_form

SIDES = {"cuda": ("flash", "cudnn", "efficient"), "cpu": ("flash", "math")}
BATCH = {"cuda": 32, "cpu": 2}
PADDED = {40: 64}  # head sizes that are also tried larger
SECONDS = 30  # that a row takes at most

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention_of(kernel: str, size: int, padded: int) -> Attend:
    """Attention with heads of `size` in a kernel that sees them as `padded`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if padded != size:
            query, key, value = (F.pad(tensor, (0, padded - size)) for tensor in (query, key, value))
        with sdpa_kernel(KERNELS[kernel]):
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=size**-0.5)
        return attended[..., :size].transpose(1, 2).flatten(2)

    return attend


def calls_with(attend: Attend, call: Call, number: int, dtype: torch.dtype, device: torch.device, backward: bool) -> list[Work]:
    """So many calls, each on inputs of its own."""

    def build() -> Work:
        query, key, value, mask = call.tensors(dtype, device)
        for tensor in (query, key, value):
            tensor.detach().normal_()
        gradient = torch.randn_like(attend(query, key, value, mask))

        def work() -> Any:
            attended = attend(query, key, value, mask)
            return torch.autograd.grad(attended, (query, key, value), gradient) if backward else attended.detach()

        return work

    return [build() for _ in range(number)]


def short_calls(call: Call, number: int, dtype: torch.dtype, device: torch.device, backward: bool) -> list[Work]:
    """So many calls of our kernel for short sequences, each on a stacked projection of its own."""

    def build() -> Work:
        _, _, value, mask = call.tensors(dtype, device)
        batch, heads, tokens, size = value.shape
        projected = torch.randn(batch, tokens, 3 * heads * size, device=device, dtype=dtype).requires_grad_()
        gradient = torch.randn(batch, tokens, heads * size, device=device, dtype=dtype)

        def work() -> Any:
            attended = short_attention(projected, mask, heads)
            return torch.autograd.grad(attended, projected, gradient) if backward else attended.detach()

        return work

    return [build() for _ in range(number)]


def measure_call(call: Call, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Median microseconds of every side, forward and with the backward pass; notes on those that fail."""
    size = call.query[0][-1]
    sides: dict[str, Callable[..., list[Work]]] = {
        kernel if padded == size else f"{kernel}, padded": partial(calls_with, attention_of(kernel, size, padded))
        for padded in dict.fromkeys((size, PADDED.get(size, size)))
        for kernel in SIDES[device.type]
    }
    if call.is_short(dtype):
        sides["engine"] = short_calls
    moved = dtype.itemsize * sum(shape.numel() for shape, _ in (call.query, call.query, call.key, call.value))
    number = 1 if moved >= LARGE else LAUNCHES
    row: dict[str, Any] = {"forward": {}, "training": {}, "notes": {}}
    for side, calls in sides.items():  # one after the other: a side's failure, or its memory, is its own
        for kind, backward in (("forward", False), ("training", True)):
            try:
                works = calls(call, number, dtype, device, backward)
            except RuntimeError as error:
                row["notes"][side] = f"does not run: {str(error).splitlines()[0]}"
                break
            times, notes = microseconds({side: works}, device)
            row["notes"] |= notes
            if side in times:
                row[kind][side] = statistics.median(times[side])
    if not row["training"]:
        raise RuntimeError(f"no kernel ran: {row['notes']}")
    return row


def calls_by_checkpoint(names: list[str], device: torch.device) -> dict[str, list[Call]]:
    """The distinct shapes of each checkpoint's training step."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            if name in TINY:
                family = open_tiny(name, Path(directory))
                model: Any = family.load_model()
            else:
                family = open_family(write(name, Path(directory)))
                with torch.device("meta"):
                    model = trained_model(name)
                    to_training_form(model, SHIPPED)
            calls = calls_of(family, model, BATCH[device.type])
        found[name] = list({str(call): call for call in reversed(calls)}.values())[::-1]
    return found


def measure_all(names: list[str], device: torch.device, rows: Rows) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        rows.measure(f"{name}: {call}", SECONDS, lambda call=call: measure_call(call, dtype, device))  # type: ignore[misc]
        for name, calls in calls_by_checkpoint(names, device).items()
        for call in calls
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; the gain is over Flash, or over memory-efficient attention where Flash does not run."""
    lines = ["| call | kernel | forward, us | with backward, us | gain |", "|---|---|---|---|---|"]
    for row in rows:
        if "training" not in row:
            lines.append(f"| {row['name']} | {row.get('failed') or row['missing']} | | | |")
            continue
        base = row["training"].get("flash") or row["training"].get("efficient")
        for side, taken in row["training"].items():
            gain = f"{base / taken:.2f}" if base else ""
            lines.append(f"| {row['name']} | {side} | {row['forward'][side]:.1f} | {taken:.1f} | {gain} |")
        lines += [f"| {row['name']} | {side} | {note} | | |" for side, note in row["notes"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--checkpoints", nargs="+", choices=[*CHECKPOINTS, *TINY], help="default: all")
    options = parser.parse_args()
    device = this_device()
    names = options.checkpoints or list(CHECKPOINTS if device.type == "cuda" else TINY)
    rows = Rows(options.json, __doc__, options.minutes)
    print(table(measure_all(names, device, rows)))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
