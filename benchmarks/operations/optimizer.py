"""What does one pass over the optimizer's state gain? `python -m benchmarks.operations.optimizer [--parameters N]`

A step on flat buffers with bf16 gradients and weights, fp32 master, two moments and a moving average, beside

- `passes`: clipping, torch's fused AdamW, the moving average and the cast to bf16, each a pass of its own;
- `compiled`: the reference of `engine::adamw_ema_` under torch.compile.

Predicted: 36 bytes per parameter in one pass against 62 in four. Medians; one side after the other, because the state of one
is most of what a GPU holds. `copy` is the time that a copy's bandwidth gives for those 36 bytes.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.timing import Work, copying, microseconds, summarize
from engine.kernels import adamw_ema_
from engine.kernels.adamw_ema import reference_adamw_ema_

PARAMETERS = {"cuda": 859_520_964, "cpu": 16_000_000}  # on a GPU, those of SD 1.5, or as many as fit
BYTES = 36
STATE = 24  # bytes per parameter that a side holds at most; the separate passes also keep the scaled gradient in fp32
OPTIONS = (0.9, 0.999, 1e-8, 1e-2)
SCALE = 0.5  # of the gradient: not 0, which would skip the step
COPIED = 2**32  # bytes read and written by the copy at most
SECONDS = 60  # that the row takes at most

State = tuple[Tensor, Tensor]  # master weights and their average, which every step moves


def parameters_that_fit(device: torch.device) -> int:
    """The default, or what leaves a quarter of the GPU's memory free."""
    if device.type != "cuda":
        return PARAMETERS["cpu"]
    return min(PARAMETERS["cuda"], 3 * torch.cuda.get_device_properties(device).total_memory // 4 // STATE)


def in_one_pass(step: Callable[..., Any], parameters: int, device: torch.device) -> tuple[Work, State]:
    gradient = torch.randn(parameters, device=device, dtype=torch.bfloat16)
    scalars = [torch.tensor([value], device=device) for value in (1e-4, SCALE, 10.0, 1e-4)]
    master, average = (torch.randn(parameters, device=device) for _ in range(2))
    state = (master, torch.zeros_like(master), torch.zeros_like(master), gradient, master.bfloat16(), average)
    return lambda: step(*state, *scalars, *OPTIONS), (master, average)


def in_separate_passes(parameters: int, device: torch.device) -> tuple[Work, State]:
    gradient = torch.randn(parameters, device=device, dtype=torch.bfloat16)
    master, average = (torch.randn(parameters, device=device) for _ in range(2))
    master.requires_grad_()
    weights = master.detach().bfloat16()
    optimizer = torch.optim.AdamW([master], lr=1e-4, weight_decay=1e-2, fused=True, capturable=device.type == "cuda")
    scale = torch.tensor(SCALE, device=device)
    master.grad = torch.empty_like(master)

    def step() -> None:
        torch.mul(gradient, scale, out=master.grad)
        optimizer.step()
        with torch.no_grad():
            average.lerp_(master, 1e-4)
            weights.copy_(master)

    return step, (master.detach(), average)


compiled_adamw_ema_ = torch.compile(reference_adamw_ema_)
SIDES: dict[str, Callable[[int, torch.device], tuple[Work, State]]] = {
    "engine": partial(in_one_pass, adamw_ema_),
    "passes": in_separate_passes,
    "compiled": partial(in_one_pass, compiled_adamw_ema_),
}


def measure(parameters: int, compiled: bool, device: torch.device, rows: Rows | None = None) -> dict[str, Any]:
    """One row; kept in `rows` where they are given."""
    sides = [side for side in SIDES if compiled or side != "compiled"]
    work = partial(_measure, sides, parameters, device)
    return (rows or Rows(None, __doc__)).measure(f"{parameters} parameters", SECONDS, work, parameters=parameters)


def _measure(sides: list[str], parameters: int, device: torch.device) -> dict[str, Any]:
    moved, copied = BYTES * parameters, min(BYTES * parameters, COPIED)
    times, notes = microseconds({"copy": [copying(copied, device)]}, device)
    times["copy"] = [value * moved / copied for value in times["copy"]]
    for side in sides:
        measured, noted = _measure_side(side, parameters, device)
        times, notes = times | measured, notes | noted
    return summarize(times, notes, moved)


def _measure_side(side: str, parameters: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Of one side alone, so that no other's state needs memory at the same time."""
    step, state = SIDES[side](parameters, device)
    measured = microseconds({side: [step]}, device)
    check_that_it_steps(step, state)
    return measured


def check_that_it_steps(step: Work, state: State) -> None:
    """Raises `ValueError` where a step changes nothing, or weights are not finite: such steps are nearly free."""
    before = [tensor[:1000].clone() for tensor in state]
    step()
    for old, new in zip(before, state, strict=True):
        if torch.equal(old, new[:1000]) or not bool(new.isfinite().all()):
            raise ValueError("a step was skipped, or its weights are not finite: its time says nothing")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each row."""
    return "\n\n".join(map(_table_of, rows))


def _table_of(row: dict[str, Any]) -> str:
    if "gain" not in row:
        return f"{row['parameters'] / 1e6:.0f} M parameters: {row.get('failed') or row['missing']}"
    lines = ["| side | ms | against one pass |", "|---|---|---|"]
    for side, value in row["microseconds"].items():
        lines.append(f"| {side} | {value / 1000:.2f} | {value / row['microseconds']['engine']:.2f} |")
    lines.append(f"\n{row['parameters'] / 1e6:.0f} M parameters, {row['bytes_per_second'] / 1e9:.0f} GB/s in one pass: "
                 f"{row['share_of_copy_bandwidth']:.0%} of a copy's bandwidth.")  # fmt: skip
    lines += [f"- {side} {note}" for side, note in row.get("notes", {}).items()]
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__)
    device = this_device()
    parser.add_argument("--parameters", type=int, default=parameters_that_fit(device), help="default: %(default)s")
    options = parser.parse_args()
    rows = Rows(options.json, __doc__, options.minutes)
    print(table([measure(options.parameters, True, device, rows)]))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
