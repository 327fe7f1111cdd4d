"""What ran on the device within some steps, by torch's profiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.tools.timing import synchronize

Timeline = tuple[list[tuple[str, float]], float, float]


def profiled(step: Callable[[], Any], steps: int, device: torch.device) -> Timeline:
    """As `timeline`, of so many steps. On a CPU the profiler's operators stand in for kernels."""
    gpu = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    return timeline(profiler, gpu)


def timeline(profiler: Any, gpu: bool) -> Timeline:
    """Names and microseconds of what ran on the device, the microseconds in which anything did, and those in all.

    On a CPU operators call operators, so that each has its own time without theirs.
    """
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    events = [e for e in profiler.events() if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    if not gpu:
        events = [e for e in events if e.name.startswith(("aten::", "engine::"))]  # and not what dynamo and autograd note
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    work = [(e.name, e.time_range.elapsed_us() if gpu else e.self_cpu_time_total) for e in events]
    return work, busy, end - spans[0][0]
