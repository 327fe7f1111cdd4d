"""What does one pass over the optimizer's state gain? `python -m benchmarks.optimizer [--parameters N]`

A step on flat buffers with bf16 gradients and weights, fp32 master, two moments and a moving average, beside

- `passes`: clipping, torch's fused AdamW, the moving average and the cast to bf16, each a pass of its own;
- `compiled`: the reference of `engine::adamw_ema_` under torch.compile.

Predicted: 36 bytes per parameter in one pass against 62 in four. Medians of turns that alternate; `copy` is the share of a
copy's bandwidth for those 36 bytes.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import write_result
from benchmarks.timing import compare
from engine.kernels import adamw_ema_
from engine.kernels.adamw_ema import reference_adamw_ema_

PARAMETERS = {"cuda": 859_520_964, "cpu": 16_000_000}  # on a GPU, those of SD 1.5
BYTES = 36
OPTIONS = (0.9, 0.999, 1e-8, 1e-2)


def works(parameters: int, device: torch.device, compiled: bool) -> dict[str, Callable[[], Any]]:
    gradient = torch.randn(parameters, device=device, dtype=torch.bfloat16)
    scalars = [torch.tensor([value], device=device) for value in (1e-4, 0.5, 10.0, 1e-4)]

    def in_one_pass(step: Callable[..., Any]) -> Callable[[], Any]:
        master, average = (torch.randn(parameters, device=device) for _ in range(2))
        state = (master, torch.zeros_like(master), torch.zeros_like(master), gradient, master.bfloat16(), average)
        return lambda: step(*state, *scalars, *OPTIONS)

    result = {"engine": in_one_pass(adamw_ema_), "passes": _separate_passes(gradient)}
    return result | ({"compiled": in_one_pass(torch.compile(reference_adamw_ema_))} if compiled else {})


def _separate_passes(gradient: Tensor) -> Callable[[], None]:
    master, average = (torch.randn(gradient.numel(), device=gradient.device) for _ in range(2))
    master.requires_grad_()
    weights = master.detach().bfloat16()
    optimizer = torch.optim.AdamW([master], lr=1e-4, weight_decay=1e-2, fused=True)
    scale = torch.tensor(0.5, device=gradient.device)
    master.grad = torch.empty_like(master)

    def step() -> None:
        torch.mul(gradient, scale, out=master.grad)
        optimizer.step()
        with torch.no_grad():
            average.lerp_(master, 1e-4)
            weights.copy_(master)

    return step


def measure(parameters: int, compiled: bool, device: torch.device) -> dict[str, Any]:
    return {"parameters": parameters, **compare(works(parameters, device, compiled), BYTES * parameters, device)}


def table(row: dict[str, Any]) -> str:
    """A Markdown table."""
    lines = ["| side | ms | against one pass |", "|---|---|---|"]
    for side, value in row["microseconds"].items():
        lines.append(f"| {side} | {value / 1000:.2f} | {value / row['microseconds']['engine']:.2f} |")
    lines.append(f"\n{row['parameters'] / 1e6:.0f} M parameters, {row['bytes_per_second'] / 1e9:.0f} GB/s in one pass: "
                 f"{row['share_of_copy_bandwidth']:.0%} of a copy's bandwidth.")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.optimizer", description=__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parameters", type=int, default=PARAMETERS[device.type], help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    row = measure(options.parameters, True, device)
    print(table(row))
    write_result(options.json, __doc__, **row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
