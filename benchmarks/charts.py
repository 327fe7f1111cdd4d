"""Pictures of the benchmarks' results: waterfalls of the levers, the roofline, kernels against a copy's bandwidth."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.files import write_atomically

_BLUE, _GREY, _RED = "#3b6ea5", "#b0b0b0", "#b5483b"


def waterfall(measured: dict[str, Any], path: Path) -> None:
    """Samples per second by lever, one panel per model, each bar with its gain over the recipe."""
    results = measured["results"]
    rows_of_panels = -(-len(results) // 2)
    figure = Figure(figsize=(11, 3 * rows_of_panels), layout="constrained")
    for panel, result in zip(figure.subplots(rows_of_panels, 2, squeeze=False).flat, results, strict=False):
        rows = [row for row in result["rows"] if "samples_per_second" in row and row["batch"] == result["rows"][0]["batch"]]
        rates = [row["samples_per_second"] for row in rows]
        low, high = ([abs(row["samples_per_second"] - row[end]) for row in rows] for end in ("low", "high"))
        bars = panel.barh([row["lever"] for row in rows], rates, xerr=[low, high], color=[_GREY, *[_BLUE] * (len(rows) - 1)])
        panel.bar_label(bars, [f" {rate / rates[0]:.2f} x" for rate in rates], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.set_title(f"{result['checkpoint']}, batch {result['rows'][0]['batch']}", fontsize=9)
        panel.set_xlabel("samples per second")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def roofline(measured: dict[str, Any], bytes_per_second: float, path: Path) -> None:
    """The last measured lever of every model and batch size, under the limits of matrix products and of memory."""
    peak = measured["matrix_flops_per_second"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    points = []
    for result in measured["results"]:
        last: dict[int, Any] = {row["batch"]: row for row in result["rows"] if "samples_per_second" in row}
        for batch, row in last.items():
            operations = batch * row["training_flops_per_sample"]
            rate = row["samples_per_second"] * row["training_flops_per_sample"]
            points.append((operations / row["bytes_per_step"], rate, f"{result['checkpoint']}, {batch}"))
    ridge = peak / bytes_per_second
    left, right = (0.5 * min([ridge, *(x for x, *_ in points)]), 2 * max([ridge, *(x for x, *_ in points)]))
    panel.plot([left, ridge, right], [left * bytes_per_second, peak, peak], color=_GREY)
    panel.annotate(f"matrix product {peak / 1e12:.3g} TFLOP/s", (right, peak), ha="right", va="bottom", fontsize=8)
    panel.annotate(f"memory {bytes_per_second / 1e9:.3g} GB/s", (left, left * bytes_per_second), va="bottom", fontsize=8)
    for x, y, label in points:
        panel.plot(x, y, "o", color=_BLUE)
        panel.annotate(f" {label}", (x, y), fontsize=7, va="center")
    panel.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="operations per second")
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def bandwidth(rows: list[dict[str, Any]], optimizer: dict[str, Any], path: Path) -> None:
    """The share of a copy's bandwidth that each kernel reaches, beside its strongest rival's."""
    shown = [row for row in rows if row["dtype"] == "bfloat16"]
    labels = [f"{row['operation']}\n{row['shape']}, {row['layout']}" for row in shown] + ["adamw_ema_"]
    rivals = [min(row["gain"].values()) for row in [*shown, optimizer]]
    shares = [row["share_of_copy_bandwidth"] for row in [*shown, optimizer]]
    figure = Figure(figsize=(9, 1 + 0.42 * len(labels)), layout="constrained")
    panel = figure.subplots()
    places = range(len(labels))
    panel.barh(places, shares, height=0.4, color=_BLUE, label="engine")
    panel.barh(
        [place + 0.4 for place in places],
        [share / rival for share, rival in zip(shares, rivals, strict=True)],
        height=0.4, color=_GREY, label="fastest other",
    )  # fmt: skip
    panel.axvline(1, color=_RED, linewidth=1)
    panel.set_yticks([place + 0.2 for place in places], labels, fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("bytes that must move, against a copy of as many")
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
