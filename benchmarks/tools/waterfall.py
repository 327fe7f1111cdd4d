"""What the rows of levers say: tables, verdicts and charts."""

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.tools.charts import BLUE, GREY, save
from benchmarks.tools.tables import OUT_OF_MEMORY, lasts


def by_checkpoint(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of levers by checkpoint and device."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "lever" in row:
            groups.setdefault((row["checkpoint"], row["device"]), []).append(row)
    return groups


def batch_of_waterfall(rows: list[dict[str, Any]]) -> int:
    """The batch that most levers of a checkpoint were measured at."""
    batches = Counter(row["batch"] for row in rows if "samples_per_second" in row)
    return max(batches, key=lambda batch: (batches[batch], batch)) if batches else rows[0]["batch"]


def rate(rows: list[dict[str, Any]], lever: str, batch: int) -> float | None:
    return next((row.get("samples_per_second") for row in rows if (row["lever"], row["batch"]) == (lever, batch)), None)


def ratio(rows: list[dict[str, Any]], above: str, below: str, batch: int) -> float | None:
    """How much faster a lever is than another; None where a rate is missing, or both are of the engine at two commits."""
    found = {row["lever"]: row for row in rows if row["batch"] == batch and "samples_per_second" in row}
    high, low = found.get(above), found.get(below)
    if high is None or low is None or not (lasts(low) or high.get("environment") == low.get("environment")):
        return None
    return high["samples_per_second"] / low["samples_per_second"]


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Samples per second by lever, one panel per model and device, each bar with its gain over the recipe.

    Args:
        rows: those without a rate are left out, and so are gains where the recipe has none.
    """
    panels = {}
    for (checkpoint, device), group in by_checkpoint(rows).items():
        batch = batch_of_waterfall(group)
        shown = [row for row in group if row["batch"] == batch and "samples_per_second" in row]
        if shown:
            panels[f"{checkpoint}, batch {batch}\n{device}"] = (shown, rate(shown, "recipe", batch))
    rows_of_panels = max(-(-len(panels) // 2), 1)
    figure = Figure(figsize=(11, 3.4 * rows_of_panels), layout="constrained")
    places = figure.subplots(rows_of_panels, 2, squeeze=False).flat
    for panel, (title, (shown, recipe)) in zip(places, panels.items(), strict=False):
        rates = [row["samples_per_second"] for row in shown]
        low, high = ([abs(row["samples_per_second"] - row[end]) for row in shown] for end in ("low", "high"))
        colours = [GREY if row["settings"].get("options") is None else BLUE for row in shown]
        bars = panel.barh([row["lever"] for row in shown], rates, xerr=[low, high], color=colours)
        panel.bar_label(bars, [f" {value / recipe:.2f} x" if recipe else "" for value in rates], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("samples per second")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def roofline(rows: list[dict[str, Any]], bytes_per_second: float | None, path: Path) -> None:
    """The fastest lever of every model and batch size, under the limits of matrix products and of memory.

    Args:
        rows: all of one device; a limit is left out where it was not measured.
        bytes_per_second: of a copy.
    """
    peak = next((row["measured"] for row in rows if "measured" in row), None)
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    measured = [row for row in rows if "samples_per_second" in row]
    fastest = {(row["checkpoint"], row["batch"]): row for row in sorted(measured, key=lambda row: row["samples_per_second"])}
    intensities = []
    for (checkpoint, batch), row in fastest.items():
        intensity = batch * row["training_flops_per_sample"] / row["bytes_per_step"]
        reached = row["samples_per_second"] * row["training_flops_per_sample"]
        panel.plot(intensity, reached, "o", color=BLUE)
        panel.annotate(f" {checkpoint}, {batch}", (intensity, reached), fontsize=7, va="center")
        intensities.append(intensity)
    ridge = [peak / bytes_per_second] if peak and bytes_per_second else []
    left, right = 0.5 * min([*intensities, *ridge, 100]), 2 * max([*intensities, *ridge, 100])
    start = ridge[0] if ridge else left
    if peak:
        panel.plot([start, right], [peak, peak], color=GREY)
        panel.annotate(f"matrix product {peak / 1e12:.3g} TFLOP/s", (right, peak), ha="right", va="bottom", fontsize=8)
    if ridge and bytes_per_second:
        panel.plot([left, start], [left * bytes_per_second, peak], color=GREY)
        panel.annotate(f"memory {bytes_per_second / 1e9:.3g} GB/s", (left, left * bytes_per_second), va="bottom", fontsize=8)
    panel.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="operations per second")
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def table(rows: list[dict[str, Any]]) -> str:
    """The waterfalls as a Markdown table, and what they say about batches and norms."""
    columns = ["model", "lever", "batch", "samples/s", "quartiles", "against the recipe", "against its best, cached",
               "MFU, measured peak", "MFU, data sheet", "GiB allocated", "GiB reserved"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    notes = []
    for (checkpoint, device), group in by_checkpoint(rows).items():
        for row in group:
            start = f"| {checkpoint} | {row['lever']} | {row['batch']} |"
            speed = row.get("samples_per_second")
            if speed is None:
                lines.append(f"{start} {row.get('failed') or row.get('missing')} | | | | | | | |")
                continue
            bases = [rate(group, lever, row["batch"]) for lever in ("recipe", "recipe at its best, cached")]
            ratios = [f"{speed / base:.2f}" if base else "" for base in bases]
            shares = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu_measured", "mfu_data_sheet")]
            memory = [f"{row[key]:.1f}" if key in row else "" for key in ("memory_gib", "reserved_gib")]
            cells = [f"{speed:.4g}", f"{row['low']:.4g} to {row['high']:.4g}", *ratios, *shares, *memory]
            lines.append(f"{start} {' | '.join(cells)} |")
        where = f"{checkpoint} on {device}"
        halved = [row for row in group if row.get("failed") == OUT_OF_MEMORY]
        short = {row["batch"] for row in halved if row["settings"].get("options") is None}
        notes += [f"- {where}: the recipe does not fit batch {batch}; every lever took half." for batch in sorted(short)]
        notes += [f"- {where}: {verdict}" for verdict in [norms_verdict(group)] if verdict]
    return "\n".join([*lines, "", *notes])


def norms_verdict(rows: list[dict[str, Any]]) -> str:
    """Which value of `norms_when_compiled` the rows of a checkpoint support; nothing without both levers on a GPU,
    at one commit."""
    batch = batch_of_waterfall(rows)
    levers = {row["lever"]: row for row in rows if row["batch"] == batch and "memory_gib" in row}
    theirs, ours = levers.get("compiled, plain norms"), levers.get("compiled and captured")
    gain = ratio(rows, "compiled and captured", "compiled, plain norms", batch)
    if theirs is None or ours is None or gain is None:
        return ""
    gives = f"own norms give {gain:.3f} times inductor's"
    if ours["low"] > theirs["high"]:
        return f"{gives}: norms_when_compiled = True"
    if ours["high"] < theirs["low"]:
        return f"{gives}: norms_when_compiled = False"
    return f"{gives}, within the quartiles: no reason to change norms_when_compiled"
