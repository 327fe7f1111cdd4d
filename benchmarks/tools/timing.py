"""How long work takes on a device, measured so that the host, the caches and neighbouring work do not show.

On a GPU, launching a small kernel from Python takes longer than the kernel. What is timed there is the replay of a CUDA graph
that holds the calls: each has inputs and outputs of its own, and before every replay so much memory is read that the
second-level cache holds none of them.
"""

import contextlib
import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.errors import first_line
from engine.loop.capture import capture as capture_graph

REPEATS = 15
WARM_UP = 2
LAUNCHES = 20  # calls in a graph, where they are small
LARGE = 2**27  # bytes to move from which a single call exceeds every cache, and takes long enough to be timed alone

# Dense matrix products of bf16 with sums in fp32, in TFLOP/s, from NVIDIA's and AMD's data sheets; where these give only the
# figure with sparsity, half of it. The first name that a device's has as a word counts; "H100" alone is the SXM card.
DATA_SHEETS = {
    "B200": 2250.0, "GH200": 989.4, "H200 NVL": 835.5, "H200": 989.4, "H100 NVL": 835.5, "H100 PCIe": 756.0, "H100": 989.4,
    "A100": 312.0, "A30": 165.0, "A10": 125.0, "L40S": 362.0, "L4": 121.0, "MI300X": 1307.4,
}  # fmt: skip

Work = Callable[[], Any]
Capture = Callable[[Work, Any, Any], tuple[Callable[[], None], Any]]


def data_sheet_flops_per_second(device_name: str) -> float | None:
    """The bf16 matrix products that a card's data sheet promises (`DATA_SHEETS`); None for cards that are not listed."""
    figures = (1e12 * figure for name, figure in DATA_SHEETS.items() if re.search(rf"\b{name}\b", device_name))
    return next(figures, None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_in_turns(works: Sequence[Work], turns: int, warm_up: int, device: torch.device) -> list[list[float]]:
    """The times of each work, called as it is, over turns that alternate after some that warm up."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(warm_up + turns):
        for work, seconds in zip(works, taken, strict=True):
            started = time.perf_counter()
            work()
            synchronize(device)
            if turn >= warm_up:
                seconds.append(time.perf_counter() - started)
    return taken


def microseconds(
    sides: dict[str, list[Work]], device: torch.device, capture: Capture | None = None
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The times of a call of each side, over turns that alternate after some that warm up; and notes, by side.

    A side that cannot be captured has a note and is launched call by call; one that fails has a note and no times.

    Args:
        sides: of each the calls, which do the same work on inputs of their own.
        capture: what makes a graph, in the place of `engine.loop.capture.capture`; on a CPU none is made without it.
    """
    if capture is None and device.type == "cuda":
        capture = capture_graph
    runs: dict[str, Work] = {}
    notes: dict[str, str] = {}
    for side, calls in sides.items():
        try:
            runs[side], note = _prepare(calls, device, capture)
        except Exception as error:  # the other sides are still wanted
            note = f"failed: {first_line(error)}"
        if note:
            notes[side] = note
    times: dict[str, list[float]] = {side: [] for side in runs}
    for turn in range(REPEATS + WARM_UP):
        for side, run in runs.items():
            taken = _elapsed_microseconds(run, device) / len(sides[side])
            if turn >= WARM_UP:
                times[side].append(taken)
    return times, notes


def _prepare(calls: list[Work], device: torch.device, capture: Capture | None) -> tuple[Work, str | None]:
    """What runs all calls once, and why that is no graph where it should be one."""

    def run() -> list[Any]:
        return [call() for call in calls]  # results live to the end, so that each call writes to memory of its own

    if capture is None:
        return run, None
    on_gpu = device.type == "cuda"
    stream: Any = torch.cuda.Stream(device) if on_gpu else None
    if on_gpu:
        stream.wait_stream(torch.cuda.current_stream(device))
    # Compilation, the choice of algorithms and what libraries keep per stream come before the capture.
    with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():
        for _ in range(WARM_UP):
            run()
    synchronize(device)
    try:
        return capture(run, stream, None)[0], None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return run, f"not captured, so launched from Python: {first_line(error)}"
    finally:
        if on_gpu:  # torch leaves the thread on the stream of a capture that failed
            torch.cuda.set_stream(torch.cuda.default_stream(device))


def _elapsed_microseconds(run: Work, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _other_memory(device).amax()  # reads that push all else out of the cache, and hide the host's time to launch what follows
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


@functools.cache
def _other_memory(device: torch.device) -> torch.Tensor:
    """Eight times the second-level cache."""
    return torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size, device=device)


def copying(moved: int, device: torch.device) -> Work:
    """A copy of random bytes that reads and writes `moved` bytes in all, between buffers that exist."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compare(
    build: Callable[[], dict[str, Work]], moved: int, device: torch.device, capture: Capture | None = None
) -> dict[str, Any]:
    """The side `engine` of some work against the other sides, and against a copy of the bytes that it must move.

    Args:
        build: makes inputs, and each side's call on them.

    Returns:
        As `summarize`.

    Raises:
        RuntimeError: `engine` or the copy fails.
    """
    calls = LAUNCHES if (device.type == "cuda" or capture) and moved < LARGE else 1
    built = [build() | {"copy": copying(moved, device)} for _ in range(calls)]
    sides = {side: [works[side] for works in built] for side in built[0]}
    return summarize(*microseconds(sides, device, capture), moved)


def summarize(times: dict[str, list[float]], notes: dict[str, str], moved: int) -> dict[str, Any]:
    """Microseconds of every side and of the copy (medians, and quartiles), bytes per second, the gain over every other side,
    the share of the copy's bandwidth, and notes where there are any."""
    for side in ("engine", "copy"):
        if side not in times:
            raise RuntimeError(f"{side} {notes[side]}")
    median = {side: statistics.median(values) for side, values in times.items()}
    return {
        "microseconds": median, "quartiles": {side: spread(values)[1:] for side, values in times.items()},
        "bytes": moved, "bytes_per_second": moved / median["engine"] * 1e6,
        "gain": {side: value / median["engine"] for side, value in median.items() if side not in ("engine", "copy")},
        "share_of_copy_bandwidth": median["copy"] / median["engine"],
        **({"notes": notes} if notes else {}),
    }  # fmt: skip


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, and the quartiles around it."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high
