"""All measurements of the training step in one run: `python -m benchmarks.suite [--output DIR] [--minutes 9] [--tiny]`

Kernels, optimizer, overhead and steps, in this order, with one deadline: what does not fit is listed as not measured. Writes
suite.json, suite.md (tables, with device, versions and commit) and the charts waterfall.png, roofline.png and kernels.png.
Without a GPU, or with `--tiny`, shapes and models are small: a run of every path, whose numbers say nothing about a GPU.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks import charts, kernels, optimizer, overhead, step
from benchmarks.environment import RESULTS, Rows, environment, write_result
from benchmarks.published import TINY
from benchmarks.timing import copy_bytes_per_second
from engine.files import write_text
from engine.quiet import quiet_libraries

# The families first, further sizes of the decoder last, where the time may not reach.
CHECKPOINTS = ["SD 1.5, 512 px", "Kandinsky 2.2 prior", "Wuerstchen v2 prior, 768 px", "Kandinsky 2.2 decoder, 512 px",
               "Kandinsky 2.2 decoder, 768 px"]  # fmt: skip
TINY_PARAMETERS = 1_000_000


def measure(tiny: bool, minutes: float, steps: int, device: torch.device) -> dict[str, Any]:
    started = time.monotonic()
    result: dict[str, Any] = {"copy_bytes_per_second": copy_bytes_per_second(device)}
    result["kernels"] = kernels.measure(tiny, not tiny, device)
    parameters = TINY_PARAMETERS if tiny else optimizer.PARAMETERS[device.type]
    result["optimizer"] = optimizer.measure(parameters, not tiny, device)
    result["overhead"] = overhead.measure(20 * steps, device)
    left = minutes - (time.monotonic() - started) / 60
    rows = Rows(None, step.__doc__ or "", left)
    step.measure_all(rows, list(TINY) if tiny else CHECKPOINTS, device)
    result["step"] = rows.rows
    return result | {"minutes": (time.monotonic() - started) / 60}


def report(measured: dict[str, Any], environment: dict[str, Any]) -> str:
    """The tables as Markdown."""
    described = "\n".join(f"- {name}: {value}" for name, value in environment.items())
    return f"""# Benchmark suite

{described}
- copy: {measured["copy_bytes_per_second"] / 1e9:.4g} GB/s read and written
- minutes: {measured["minutes"]:.1f}

## Step

![Samples per second by lever](waterfall.png)

{step.table(measured["step"])}

![Roofline](roofline.png)

## Kernels

![Share of a copy's bandwidth](kernels.png)

{kernels.table(measured["kernels"])}

## Optimizer

{optimizer.table(measured["optimizer"])}

## Overhead

{overhead.table(measured["overhead"])}
"""


def write(measured: dict[str, Any], output: Path) -> None:
    """Writes the results, the report and the charts into a directory."""
    output.mkdir(parents=True, exist_ok=True)
    write_result(output / "suite.json", __doc__, **measured)
    charts.waterfall(measured["step"], output / "waterfall.png")
    charts.roofline(measured["step"], measured["copy_bytes_per_second"], output / "roofline.png")
    charts.bandwidth(measured["kernels"], measured["optimizer"], output / "kernels.png")
    write_text(output / "suite.md", report(measured, environment()))


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.suite", description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/suite-cpu, or -gpu")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing further after so long (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps per window (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes and models, on a GPU too")
    options = parser.parse_args()
    quiet_libraries()
    measured = measure(options.tiny or not gpu, options.minutes, options.steps, torch.device("cuda" if gpu else "cpu"))
    output = options.output or RESULTS / ("suite-gpu" if gpu else "suite-cpu")
    write(measured, output)
    print(f"{output / 'suite.md'} after {measured['minutes']:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
