"""What do a full fine-tune and a LoRA keep in memory and compute? `python -m benchmarks.steps.memory [--json FILE]`

Counted for the published models at full size on the meta device in bf16, nothing is measured: what weights, gradients and
activations take at the peak of a step (attention as Flash keeps it), what the optimizer keeps beside them,
and the operations of a sample's step. The most samples that a card takes are what these leave of it without `--reserved` GB,
which CUDA, its libraries and fragments of memory are assumed to take; frozen encoders are not in memory.
"""

import itertools
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.tools.cost import FlashAttention, operations
from benchmarks.tools.published import CHECKPOINTS, trained_model, write
from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import markdown
from engine.config.options import TrainConfig
from engine.config.schema import options_lacking
from engine.models.family import Family, open_family
from engine.quiet import quiet_libraries

CARDS = (8, 12, 16, 24)  # GB
BATCHES = (1, 8, 64, 256)  # counted; between them lines, which are never below the peak
STATE_BYTES = 14  # per trained parameter: master 4, moments 8, flat gradient 2; without masters 6
LORA = {"lora_rank": 16}
LESS = {"gradient_checkpointing": True}
WAYS: list[dict[str, Any]] = [  # to train; options that a family lacks are left out
    {}, LESS, {"masters": "none", **LESS}, LORA, LORA | LESS,
    LORA | {"base_precision": "int8", **LESS}, LORA | {"base_precision": "nf4", **LESS},
]  # fmt: skip
EXPECTED_SECONDS = 60


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return FlashAttention.apply(query, key, value)


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made inside take at a time, of those that are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()  # memory that was seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if torch.is_tensor(tensor):  # what was there before is no one's to free
                self.known.setdefault(tensor.untyped_storage(), True)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and (memory := tensor.untyped_storage()) not in self.known:
                self.known[memory] = True
                self._add(memory.nbytes())
                weakref.finalize(memory, self._add, -memory.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def _bf16() -> Iterator[None]:
    """Tensors that are made inside have bf16 numbers, none of which exists."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def differentiate(family: Family, model: Any, trained: list[Tensor], batch: int) -> None:
    """A forward pass and the gradients of a batch of nothing."""
    fields = family.encoding.record_spec | family.encoding.text_fields
    record = {name: torch.empty(batch, *field.shape, dtype=field.dtype) for name, field in fields.items()}
    prediction = family.predict(model, record[family.encoding.mean], torch.zeros(batch, dtype=torch.float32), record)
    torch.autograd.grad(prediction, trained, torch.empty_like(prediction), allow_unused=True)


def count(checkpoint: str, options: dict[str, Any]) -> dict[str, Any]:
    """Parameters, operations of a sample's step, and bytes at a step's peak by batch."""
    with tempfile.TemporaryDirectory() as directory:
        config = write(checkpoint, Path(directory), mixed_precision="bf16", **options)
        family = open_family(config)
    with _bf16():
        model = trained_model(checkpoint).train()
        family.ready_to_train(model)
        trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with operations() as flops:
            differentiate(family, model, trained, 1)
        peaks = {}
        for batch in BATCHES:
            with patch.object(F, "scaled_dot_product_attention", _attention), _Peak() as memory:
                differentiate(family, model, trained, batch)
            peaks[batch] = _bytes_of(model) + memory.peak
    numbers = sum(parameter.numel() for parameter in trained)
    beside = (STATE_BYTES - 8 * (config.masters == "none")) * numbers
    return {
        "trained": numbers, "flops": float(flops.get_total_flops()), "weight_bytes": _bytes_of(model), "state_bytes": beside,
        **{f"bytes_{batch}": peak + beside for batch, peak in peaks.items()},
    }  # fmt: skip


def _bytes_of(model: Any) -> int:
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def words_of(way: dict[str, Any]) -> str:
    """How a row calls a way to train."""
    what = f"LoRA of rank {LORA['lora_rank']}" if way == LORA else "LoRA" if LORA.items() <= way.items() else "all weights"
    options = (f"--{name}" if value is True else f"--{name} {value}" for name, value in way.items() if name not in LORA)
    return ", ".join([what, *options])


def fits(row: dict[str, Any], room: float) -> int:
    """The most samples in a batch, of those counted, whose peak is within so many bytes."""
    most = 0
    for left, right in itertools.pairwise(BATCHES):
        first, slope = row[f"bytes_{left}"], (row[f"bytes_{right}"] - row[f"bytes_{left}"]) / (right - left)
        if first > room:
            break
        most = min(right, int(left + (room - first) // slope))
    return most


def table(rows: list[dict[str, Any]], reserved: float) -> str:
    """Markdown: a line for each model and way of training."""
    shown = [
        row | {
            "millions": row["trained"] / 1e6, "tflop": row["flops"] / 1e12, "weights": row["weight_bytes"] / 1e9,
            "state": row["state_bytes"] / 1e9, "one": row["bytes_1"] / 1e9,
            "each": (row["bytes_64"] - row["bytes_8"]) / 56 / 1e9,
            **{f"card_{card}": fits(row, (card - reserved) * 1e9) or "none" for card in CARDS},
        }
        for row in rows if "flops" in row
    ]  # fmt: skip
    cards = {f"samples on {card} GB": f"card_{card}" for card in CARDS}
    return markdown(shown, {
        "model": "checkpoint", "trained": "way", "M parameters": "millions", "TFLOP per sample": "tflop",
        "weights, GB": "weights", "state, GB": "state", "peak of one sample, GB": "one", "each further, GB": "each", **cards,
    })  # fmt: skip


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--reserved", type=float, default=1.0, help="GB of a card that nothing is kept in (default: 1)")
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS), metavar="NAME")
    options = parser.parse_args()
    quiet_libraries()
    rows = Rows(options.json, __doc__, options.minutes)
    found = []
    for checkpoint in options.checkpoints:
        lacking = options_lacking(TrainConfig, CHECKPOINTS[checkpoint][0])
        ways = [{name: value for name, value in way.items() if name not in lacking} for way in WAYS]
        for way, given in {words_of(way): way for way in ways}.items():
            work = partial(count, checkpoint, given)
            found.append(rows.measure(f"{checkpoint}: {way}", EXPECTED_SECONDS, work, checkpoint=checkpoint, way=way))
    print(table(found, options.reserved))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
