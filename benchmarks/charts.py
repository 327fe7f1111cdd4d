"""Pictures of the benchmarks' results: waterfalls of the levers, the roofline, kernels against a copy's bandwidth."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.step import batch_of_waterfall, by_checkpoint, rate
from engine.files import write_atomically

_BLUE, _GREY, _RED = "#3b6ea5", "#b0b0b0", "#b5483b"


def waterfall(rows: list[dict[str, Any]], path: Path) -> None:
    """Samples per second by lever, one panel per model and device, each bar with its gain over the recipe.

    Args:
        rows: of `benchmarks.step`; those without a rate are left out, and so are gains where the recipe has none.
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
        colours = [_GREY if row["settings"].get("options") is None else _BLUE for row in shown]
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
    """The last measured lever of every model and batch size, under the limits of matrix products and of memory.

    Args:
        rows: of `benchmarks.step`, all of one device; a limit is left out where it was not measured.
        bytes_per_second: of a copy.
    """
    peak = next((row["measured"] for row in rows if "measured" in row), None)
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    last = {(row["checkpoint"], row["batch"]): row for row in rows if "samples_per_second" in row}
    intensities = []
    for (checkpoint, batch), row in last.items():
        intensity = batch * row["training_flops_per_sample"] / row["bytes_per_step"]
        reached = row["samples_per_second"] * row["training_flops_per_sample"]
        panel.plot(intensity, reached, "o", color=_BLUE)
        panel.annotate(f" {checkpoint}, {batch}", (intensity, reached), fontsize=7, va="center")
        intensities.append(intensity)
    ridge = [peak / bytes_per_second] if peak and bytes_per_second else []
    left, right = 0.5 * min([*intensities, *ridge, 100]), 2 * max([*intensities, *ridge, 100])
    start = ridge[0] if ridge else left
    if peak:
        panel.plot([start, right], [peak, peak], color=_GREY)
        panel.annotate(f"matrix product {peak / 1e12:.3g} TFLOP/s", (right, peak), ha="right", va="bottom", fontsize=8)
    if ridge and bytes_per_second:
        panel.plot([left, start], [left * bytes_per_second, peak], color=_GREY)
        panel.annotate(f"memory {bytes_per_second / 1e9:.3g} GB/s", (left, left * bytes_per_second), va="bottom", fontsize=8)
    panel.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="operations per second")
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def bandwidth(rows: list[dict[str, Any]], optimizer: dict[str, Any], path: Path) -> None:
    """The share of a copy's bandwidth that each kernel reaches, beside its strongest rival's.

    Args:
        rows: of `benchmarks.kernels`; those without a share are left out, and so is a rival that has no time.
        optimizer: of `benchmarks.optimizer`, may be empty.
    """
    named = [(f"{row['operation']}\n{row['shape']}, {row['layout']}", row) for row in rows if row.get("dtype") == "bfloat16"]
    named = [(label, row) for label, row in [*named, ("adamw_ema_", optimizer)] if "share_of_copy_bandwidth" in row]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(named)), layout="constrained")
    panel = figure.subplots()
    ours = {place: row["share_of_copy_bandwidth"] for place, (_, row) in enumerate(named)}
    rivals = {place: ours[place] / min(row["gain"].values()) for place, (_, row) in enumerate(named) if row.get("gain")}
    panel.barh(list(ours), list(ours.values()), height=0.4, color=_BLUE, label="engine")
    panel.barh([p + 0.4 for p in rivals], list(rivals.values()), height=0.4, color=_GREY, label="fastest other")
    panel.axvline(1, color=_RED, linewidth=1)
    panel.set_yticks([place + 0.2 for place in ours], [label for label, _ in named], fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("bytes that must move, against a copy of as many")
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
