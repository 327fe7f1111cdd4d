"""How long work takes on a device, measured so that the host and neighbouring work do not show."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 15
WARM_UP = 2
LAUNCHES = 10  # of a GPU's work between two events, so that the host's time to launch it hides behind them


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def microseconds(works: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """The times of each work over turns that alternate, after some that warm up."""
    once = _device_microseconds if device.type == "cuda" else _host_microseconds
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(REPEATS + WARM_UP):
        for name, work in works.items():
            taken = once(work)
            if turn >= WARM_UP:
                times[name].append(taken)
    return times


def _host_microseconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e6


def _device_microseconds(work: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(LAUNCHES):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / LAUNCHES


def copying(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that reads and writes `moved` bytes in all, between buffers that exist."""
    source, target = (torch.zeros(max(moved // 2, 1), dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def compare(works: dict[str, Callable[[], Any]], moved: int, device: torch.device) -> dict[str, Any]:
    """The side `engine` of some work against the other sides, and against a copy of the bytes that it must move.

    Returns:
        Microseconds of every side and of the copy (medians, and quartiles), bytes per second, the gain over every other side,
        and the share of the copy's bandwidth.
    """
    times = microseconds(works | {"copy": copying(moved, device)}, device)
    median = {side: statistics.median(values) for side, values in times.items()}
    return {
        "microseconds": median, "quartiles": {side: spread(values)[1:] for side, values in times.items()},
        "bytes": moved, "bytes_per_second": moved / median["engine"] * 1e6,
        "gain": {side: median[side] / median["engine"] for side in works if side != "engine"},
        "share_of_copy_bandwidth": median["copy"] / median["engine"],
    }  # fmt: skip


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    moved = 2**32 if device.type == "cuda" else 2**28
    return moved / statistics.median(microseconds({"": copying(moved, device)}, device)[""]) * 1e6


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, and the quartiles around it."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high
