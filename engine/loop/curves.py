"""Curves of metrics, and of the held-out loss by timestep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from engine.files import write_atomically


def curves(
    lines: Sequence[dict[str, float]], names: Sequence[str], path: Path, held_out: Sequence[dict[str, Any]] = ()
) -> None:
    """Plots metrics by step, one panel per name, as a PNG.

    Args:
        held_out: the lines of the held-out loss: it stands beside the training's, and in two panels by timestep, over which it
            goes through some orders of magnitude.
    """
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(10, 3 * rows + 3.6 * bool(held_out)), layout="constrained")
    panels = figure.subplots(rows + bool(held_out), 2, squeeze=False, height_ratios=[3.0] * rows + [3.6] * bool(held_out))
    for axes, name in zip(panels.flat, names, strict=False):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], linewidth=1, label="training")
        for part in sorted({key for line in lines for key in line if key.startswith(f"{name}/")}):  # of one data set
            there = [line for line in lines if line.get(part) is not None]
            axes.plot(*_points(there, [line[part] for line in there]), linewidth=0.7, label=part.partition("/")[2])
            axes.legend(fontsize=8)
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
        if held_out and name == "loss":
            for of, label in (("validation_loss", "held out"), ("validation_loss_ema", "held out, average")):
                if of in held_out[0]:
                    axes.plot(*_points(held_out, [line.get(of) for line in held_out]), ".-", linewidth=1.5, label=label)
            axes.legend(fontsize=8)
    if held_out:
        of = "validation_loss_ema" if "validation_loss_ema" in held_out[-1] else "validation_loss"
        described = "held-out loss of the average" if of.endswith("ema") else "held-out loss"
        _by_timestep(panels[-1], held_out, f"{of}_by_timestep", described)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def _by_timestep(panels: Sequence[Any], held_out: Sequence[dict[str, Any]], of: str, described: str) -> None:
    """The loss in each range of timesteps: as curves, and, relative to its first round, as a heat map over the training."""
    ranges = list(held_out[-1][of])
    lines = [line for line in held_out if list(line.get(of, ())) == ranges]  # the ranges may have been others before a resume
    colours = matplotlib.colormaps["viridis"]
    for place, name in enumerate(ranges):
        colour = colours(place / max(len(ranges) - 1, 1))
        panels[0].plot(*_points(lines, [line[of][name] for line in lines]), ".-", linewidth=1, color=colour, label=name)
    panels[0].set(title=f"{described}, by timesteps", xlabel="step")
    losses = np.array([[line[of][name] for line in lines] for name in ranges], np.float64)  # None is no number
    losses[~(losses > 0)] = np.nan
    if np.isfinite(losses).any() and np.nanmax(losses) > 2 * np.nanmin(losses):
        panels[0].set(yscale="log")
        panels[0].yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # few enough to be written, over many decades too
        for formatted in (panels[0].yaxis.set_major_formatter, panels[0].yaxis.set_minor_formatter):
            formatted(FormatStrFormatter("%.3g"))  # not 6 x 10^-1
        panels[0].tick_params(axis="y", which="minor", labelsize=8)
    panels[0].grid(alpha=0.3, which="both")
    beside = {"fontsize": 7, "ncols": 1 + len(ranges) // 12, "loc": "center left", "bbox_to_anchor": (1, 0.5)}
    panels[0].legend(**beside, reverse=len(ranges) < 12)  # from top to bottom as in the heat map
    steps = np.array([line["step"] for line in lines], np.float64)
    between = (steps[1:] + steps[:-1]) / 2
    reach = (steps[-1] - between[-1]) if len(steps) > 1 else 0.5
    edges = np.concatenate([[steps[0] - ((between[0] - steps[0]) if len(steps) > 1 else 0.5)], between, [steps[-1] + reach]])
    if np.isfinite(losses).any():
        finite = np.isfinite(losses)
        change = losses / losses[np.arange(len(ranges)), finite.argmax(1)][:, None]
        most = max(1.01, np.nanmax(np.maximum(change, 1 / change)))  # white is no change, red is worse
        mesh = panels[1].pcolormesh(edges, np.arange(len(ranges) + 1), change, norm=LogNorm(1 / most, most), cmap="RdBu_r")
        bar = panels[1].figure.colorbar(mesh, ax=panels[1], ticks=[1 / most, most**-0.5, 1, most**0.5, most], format="%.3g")
        bar.ax.minorticks_off()
    shown = range(0, len(ranges), -(-len(ranges) // 12))
    panels[1].set_yticks([place + 0.5 for place in shown], [ranges[place] for place in shown], fontsize=7)
    panels[1].set(title=f"{described}, relative to its first", xlabel="step", ylabel="timesteps")


def _points(lines: Sequence[dict[str, Any]], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Steps and values, of the lines that have one."""
    found = [(line["step"], value) for line, value in zip(lines, values, strict=True) if value is not None]
    return [step for step, _ in found], [value for _, value in found]
