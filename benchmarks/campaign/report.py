"""Writes what a campaign has brought so far: `python -m benchmarks.campaign.report DIR`.

`campaign.json` becomes `campaign.md` and charts. A table or chart that fails costs only itself: what was measured stays.
"""

import argparse
import importlib
import json
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.campaign.plan import PLAN, Part, rehearsal
from benchmarks.campaign.processes import REPORT_SECONDS
from benchmarks.operations import kernels
from benchmarks.steps import curves
from benchmarks.tools import profile, waterfall
from benchmarks.tools.levers import LEVERS
from benchmarks.tools.tables import OUT_OF_MEMORY, cell, markdown, problem
from benchmarks.tools.waterfall import batch_of_waterfall, by_checkpoint, rate, ratio
from engine.files import write_text

Rows = list[dict[str, Any]]
TRACE_LINES = 12  # of a row's failure

# What others reach per GPU on a UNet of SD's size at 512 px with cached latents: who, card, images per second, how.
ANCHORS = [
    ("MLPerf Training 4.0, Stable Diffusion", "H100", "126", "8 GPUs, batch 64 per GPU"),
    ("MLPerf Training 4.0 and 5.0, Stable Diffusion", "H200", "129 to 150", "8 GPUs"),
    ("mosaicml/diffusion", "A100", "36", ""),
]
ANCHORED = ("SD 1.5, 512 px", "sd")
# Lever of docs/performance.md -> rows of benchmarks.steps.step whose ratio measures it, and what is predicted there.
PREDICTIONS = [
    ("cached latents", "recipe, cached", "recipe", "1.4 times for SD 1.5 at 512 px; far more for `kandinsky-prior`"),
    ("bf16 weights, channels last, own kernels", "engine", "recipe, cached", "1.1 to 1.3 times"),
    ("`--compile`", "compiled and captured", "captured", "1.3 times and more"),
    ("`engine::group_norm_silu` under torch.compile", "compiled and captured", "compiled, plain norms", "open"),
    (
        "`engine::gelu_response_norm` and `engine::gelu` under torch.compile",
        "compiled and captured",
        "compiled, plain activations",
        "1.3 times for `wuerstchen`, 1.04 for SD 1.5",
    ),
    ("`engine::short_attention`", "compiled and captured", "compiled, torch's attention", "1.10 times for `kandinsky-prior`"),
    (
        "CUDA graphs, with cuDNN's search and stacked projections",
        "captured",
        "engine",
        "nothing at batch 32 but for the search; 1.5 times and more for `kandinsky-prior`",
    ),
    ("everything", "compiled and captured", "recipe at its best, cached", "not predicted"),
]
# Checkpoint -> images per second aimed at on an H200 and on an H100, and the ratio to the recipe.
TARGETS = {
    "SD 1.5, 512 px": ({"H200": 180, "H100": 165}, 2.5),
    "Kandinsky 2.2 prior": ({"H200": 1000, "H100": 950}, 4),
    "Kandinsky 2.2 decoder, 768 px": ({"H200": 70, "H100": 65}, 2),
    "Wuerstchen v2 prior, 768 px": ({"H200": 120, "H100": 110}, 2),
}
IDLE = 0.01  # of a step, at most between kernels


def fastest(rows: Rows) -> dict[str, Any]:
    return max(rows, key=lambda row: row["samples_per_second"])


def targets(rows: Rows) -> str:
    """Of every checkpoint the fastest row of any batch, and at the batch of the waterfall, where that is another: what is aimed
    at, and the ratios over the recipe's rows at the same batch."""
    columns = ["model", "device", "aim, samples/s", "fastest", "lever", "batch", "GiB allocated", "GiB reserved", "aim, ratio",
               "over the recipe", "over it cached", "over it at its best, cached", "idle between kernels, of a step",
               "longest gap, ms", "aim"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for (checkpoint, device), group in by_checkpoint(rows).items():
        ours = [row for row in group if "samples_per_second" in row and row["settings"].get("options") is not None]
        speeds, aim = TARGETS.get(checkpoint, ({}, ""))
        for batch in dict.fromkeys((fastest(ours)["batch"], batch_of_waterfall(group)) if ours else ()):
            of_batch = [row for row in ours if row["batch"] == batch]
            if not of_batch:
                continue
            best = fastest(of_batch)
            speed = best["samples_per_second"]
            recipes = [rate(group, lever, batch) for lever in ("recipe", "recipe, cached", "recipe at its best, cached")]
            profiled = best.get("profile", {})
            idle = profiled["milliseconds"]["idle"] / profiled["step_milliseconds"] if profiled else None
            cells = [
                checkpoint, device, next((fast for card, fast in speeds.items() if card in device), ""), speed, best["lever"],
                batch, best.get("memory_gib"), best.get("reserved_gib"), aim,
                *(recipe and speed / recipe for recipe in recipes),
                None if idle is None else f"{idle:.2%}", profiled.get("longest_gap_milliseconds"), f"under {IDLE:.0%}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join(lines)


def anchors(rows: Rows) -> str:
    """The fastest row of SD 1.5 on every device, among what others reach."""
    lines = ["| who | card | images/s | how |", "|---|---|---|---|"]
    for (checkpoint, device), group in by_checkpoint(rows).items():
        measured = [row for row in group if "samples_per_second" in row]
        if checkpoint in ANCHORED and measured:
            best = fastest(measured)
            lines.append(
                f"| {checkpoint}, here | {device} | {best['samples_per_second']:.4g} | {best['lever']}, batch {best['batch']} |"
            )
    return "\n".join([*lines, *(f"| {' | '.join(anchor)} |" for anchor in ANCHORS)])


def predictions(rows: Rows) -> str:
    """What docs/performance.md predicts of each lever, beside the measured ratio of every checkpoint."""
    groups = by_checkpoint(rows)
    titles = [" on ".join(key) for key in groups]
    lines = ["| lever | measured as | predicted | " + " | ".join(titles) + " |", "|---|---|---|" + "---|" * len(titles)]
    for lever, above, below, predicted in PREDICTIONS:
        ratios = []
        for group in groups.values():
            found = [ratio(group, above, below, batch) for batch in dict.fromkeys(row["batch"] for row in group)]
            ratios.append(", ".join(f"{gain:.2f} x" for gain in found if gain))
        lines.append(f"| {lever} | {above} / {below} | {predicted} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def guarded(write: Callable[[], str]) -> str:
    """What `write` returns, or why it returns nothing."""
    try:
        return write()
    except Exception:  # whatever is odd about one part's rows, the others are still wanted
        return f"This could not be written:\n\n```\n{traceback.format_exc(limit=-2)}```"


def rows_of(state: dict[str, Any], benchmark: str) -> Rows:
    """All kept rows of a benchmark's parts, with numbers of `every_environment`; those of levers as one stands on the other,
    and not as parts came to them."""
    place = {lever.name: number for number, lever in enumerate(LEVERS)}
    parts = rehearsal() if state["rehearsal"] else PLAN
    keys = dict.fromkeys(part.key for part in parts if part.benchmark == benchmark)
    environments = every_environment(state)
    rows = [
        row | {"environment": environments.index(kept["environments"][row["environment"]])}
        for kept in (state["rows"][key] for key in keys if key in state["rows"])
        for row in kept["rows"]
    ]
    return sorted(rows, key=lambda row: place.get(row.get("lever"), -1))


def table_of(part: Part, rows: Rows) -> str:
    """The table of the question that a part asks; without one, the rows' plain values."""
    of = getattr(importlib.import_module(part.python[1]), "table", None)
    if of is not None:
        return of(rows)
    columns = {key: key for row in rows for key, value in row.items() if not isinstance(value, (dict, list))}
    return markdown(rows, {"name": "name", **columns})


def draw_charts(state: dict[str, Any], output: Path) -> dict[str, str]:
    """Benchmark -> what shows its charts."""
    of = {benchmark: rows_of(state, benchmark) for benchmark in ("step", "kernels", "optimizer", "curves")}
    single = next((row for row in of["optimizer"] if not problem(row)), {})
    drawn: dict[str, dict[str, Callable[[Path], None]]] = {
        "step": {
            "waterfall.png": lambda path: waterfall.chart(of["step"], path),
            "roofline.png": lambda path: waterfall.roofline(of["step"], copy_speed([*of["kernels"], single]), path),
            "profile.png": lambda path: profile.chart(of["step"], path),
        },
        "kernels": {"kernels.png": lambda path: kernels.chart(of["kernels"], single, path)},
        "curves": {"curves.png": lambda path: curves.chart(of["curves"], path)},
    }
    measured = [benchmark for benchmark in drawn if not all(map(problem, of[benchmark]))]
    return {
        benchmark: "\n\n".join(guarded(partial(_draw, output / name, draw)) for name, draw in drawn[benchmark].items())
        for benchmark in measured
    }


def copy_speed(rows: Rows) -> float | None:
    """Bytes per second of the fastest copy beside which a kernel was measured."""
    speeds = [row["bytes_per_second"] / row["share_of_copy_bandwidth"] for row in rows if "share_of_copy_bandwidth" in row]
    return max(speeds, default=None)


def _draw(path: Path, draw: Callable[[Path], None]) -> str:
    draw(path)
    return f"![{path.stem}]({path.name})"


def overview(state: dict[str, Any], parts: list[Part]) -> str:
    lines = ["| part | question | state | new rows | expected, s (estimate) | taken, s |", "|---|---|---|---|---|---|"]
    longest = max((call.get("seconds", math.inf) for call in state["calls"]), default=math.inf)
    for part in parts:
        kept = state["parts"].get(part.name) or {"status": None, "attempts": []}
        taken, rows = (sum(attempt[key] for attempt in kept["attempts"]) for key in ("seconds", "rows"))
        tries = f", {len(kept['attempts'])} attempts" if len(kept["attempts"]) > 1 else ""
        minutes = math.ceil((part.least + REPORT_SECONDS) / 60)
        waits = f"not begun: needs --minutes {minutes}, more than any call had" if part.least > longest else "not begun"
        lines.append(
            f"| {part.name} | {part.question} | {kept['status'] or waits}{tries} | {rows or ''} | {part.seconds:.0f} | "
            f"{taken:.0f} |"
        )
    return "\n".join(lines)


def section(parts: list[Part], state: dict[str, Any], shown: str) -> Iterator[str]:
    """Results and failures of a benchmark's parts."""
    benchmark = parts[0].benchmark
    rows = rows_of(state, benchmark)
    yield f"## {', '.join(dict.fromkeys(part.question for part in parts))}"
    asked = [f"{part.name}: `python {shlex.join(part.python)}`" for part in parts]
    predicted = [f"; predicted: {part.predicted}" if part.predicted else "" for part in parts]
    yield "\n".join(f"- {question}{expected}" for question, expected in zip(asked, predicted, strict=True))
    if rows:
        yield guarded(lambda: table_of(parts[0], rows))
        numbers = {row["environment"] + 1 for row in rows}
        yield f"Measured in environment {', '.join(map(str, sorted(numbers)))}."
    if benchmark == "step":
        yield "Targets, and the fastest rows of any batch and of the waterfall's:\n\n" + guarded(lambda: targets(rows))
        yield guarded(lambda: anchors(rows))
        yield guarded(lambda: predictions(rows))
        yield guarded(lambda: profile.table(rows))
    if shown:
        yield shown
    failed = [row for row in rows if "failed" in row]
    if failed:
        yield "Rows that failed:\n\n" + "\n".join(f"- {cell(row['name'])}: {cell(row['failed'])}{trace(row)}" for row in failed)
    yield from (ending(part, state["parts"][part.name]) for part in parts if state["parts"][part.name]["status"] != "done")


def trace(row: dict[str, Any]) -> str:
    """Where a row failed, for more than want of memory."""
    if "trace" not in row or row["failed"] == OUT_OF_MEMORY:
        return ""
    lines = ["```", *row["trace"].splitlines()[-TRACE_LINES:], "```"]
    return "\n\n" + "\n".join(f"  {line}" for line in lines) + "\n"


def ending(part: Part, kept: dict[str, Any]) -> str:
    """How a part that is not done ended, with the last lines of its output."""
    ends = "\n".join(
        f"- attempt {number}: {attempt['ended']}, after {attempt['seconds']:.0f} s and {attempt['rows']} new rows"
        for number, attempt in enumerate(kept["attempts"], 1)
    )
    tail = "\n".join(kept["tail"])
    return f"{part.name} is not complete:\n\n{ends}\n\n```\n{tail}\n```"


def described(environment: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" if name != "device" else str(value) for name, value in environment.items() if value is not None
    )


REHEARSED = """# Rehearsal of the campaign on a CPU

Tiny models, few levers, and failures on purpose: every path of the campaign ran, and **no number here says
anything about a GPU**."""


def report(state: dict[str, Any], output: Path) -> str:
    """Draws the charts; returns the whole as Markdown."""
    parts = rehearsal() if state["rehearsal"] else PLAN
    environments = every_environment(state)
    shown = draw_charts(state, output)
    where = "\n".join(f"{number}. {described(environment)}" for number, environment in enumerate(environments, 1))
    pieces = [REHEARSED if state["rehearsal"] else "# Campaign", "Environments:\n\n" + where, overview(state, parts)]
    begun = [part for part in parts if (state["parts"].get(part.name) or {}).get("attempts")]
    for benchmark in dict.fromkeys(part.benchmark for part in begun):
        of_it = [part for part in begun if part.benchmark == benchmark]
        pieces += section(of_it, state, shown.get(benchmark, ""))
    waiting = [f"- {part.name}: {part.seconds:.0f} s by estimate ({part.assumption})" for part in parts if part not in begun]
    if waiting:
        pieces.append("## Not begun yet\n\n" + "\n".join(waiting))
    calls = "\n".join(f"- {call['began']}: {', '.join(call['parts']) or 'nothing'}" for call in state["calls"])
    return "\n\n".join([*pieces, f"## Calls\n\n{calls}"]) + "\n"


def every_environment(state: dict[str, Any]) -> Rows:
    """The environments of calls and of rows, each once."""
    kept = [rows["environments"] for rows in state["rows"].values()]
    found: Rows = []
    for environment in [*state["environments"], *(environment for environments in kept for environment in environments)]:
        if environment not in found:
            found.append(environment)
    return found


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.campaign.report", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of the campaign")
    output = parser.parse_args().directory
    state = json.loads((output / "campaign.json").read_text())
    write_text(output / "campaign.md", report(state, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
