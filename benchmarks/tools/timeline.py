"""What ran on the device within some steps, by torch's profiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.tools.timing import synchronize

Timeline = tuple[list[tuple[str, float]], float, float, float]
Span = tuple[str, float, float, float]


def profiled(step: Callable[[], Any], steps: int, device: torch.device) -> Timeline:
    """As `timeline`, of so many steps. On a CPU the profiler's operators stand in for kernels."""
    gpu = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    return timeline(kernels(profiler) if gpu else operators(profiler))


def kernels(profiler: Any) -> list[Span]:
    """Name, begin, end and duration of what ran on a GPU, in microseconds.

    As the tracer gives them: the profiler's own list of events, a tree that includes the host's calls, takes 0.1 ms for each.
    """
    return [
        (event.name(), event.start_ns() / 1000, event.end_ns() / 1000, event.duration_ns() / 1000)
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]


def operators(profiler: Any) -> list[Span]:
    """The same of a CPU's operators, which call each other: each has its own time without theirs."""
    # And not what dynamo and autograd note.
    events = [event for event in profiler.events() if event.name.startswith(("aten::", "engine::"))]
    return [(event.name, event.time_range.start, event.time_range.end, event.self_cpu_time_total) for event in events]


def timeline(spans: list[Span]) -> Timeline:
    """Names and microseconds of what ran, the microseconds in which anything did, those in all, and the longest in which
    nothing did."""
    moments = sorted((start, stop) for _, start, stop, _ in spans)
    busy, gap, end = 0.0, 0.0, moments[0][0]
    for start, stop in moments:
        busy += max(stop - max(start, end), 0.0)
        gap = max(gap, start - end)
        end = max(end, stop)
    return [(name, own) for name, _, _, own in spans], busy, end - moments[0][0], gap
