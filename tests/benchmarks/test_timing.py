"""What the benchmarks time: graphs of calls on memory of their own, steps that happen, and peaks of a warm device."""

import pytest
import torch

from benchmarks.tools import timing
from engine.loop import flops
from tests.loop import tape

CPU = torch.device("cpu")


def compare(build, moved: int = 64):
    return timing.compare(build, moved, CPU, tape.capture)


def test_small_calls_are_replayed_from_a_graph_that_holds_many_each_on_memory_of_its_own():
    counters, calls = [], []

    def build():
        counter = torch.zeros(1)
        counters.append(counter)
        return {"engine": lambda: calls.append(len(counters)) or counter.add_(1), "other": lambda: counter.clone()}

    row = compare(build)
    assert len(counters) == timing.LAUNCHES
    # Python calls the work to warm up and to capture; what is timed are replays.
    assert len(calls) == (timing.WARM_UP + 1) * timing.LAUNCHES
    assert [int(counter) for counter in counters] == [2 * timing.WARM_UP + timing.REPEATS] * timing.LAUNCHES
    assert row["gain"].keys() == {"other"}
    assert "notes" not in row


def test_a_call_that_exceeds_every_cache_is_alone_in_its_graph(monkeypatch):
    monkeypatch.setattr(timing, "LARGE", 64)
    built = []
    compare(lambda: built.append(1) or {"engine": lambda: torch.ones(1)})
    assert len(built) == 1


def test_a_side_that_cannot_be_captured_is_launched_and_says_so():
    counter = torch.zeros(1)
    row = compare(lambda: {"engine": lambda: torch.ones(1), "script": lambda: counter.add_(1).item()})
    assert row["notes"] == {
        "script": "not captured, so launched from Python: the host read a value of the device while it was captured"
    }
    assert "script" in row["gain"]
    assert int(counter) >= (timing.WARM_UP + timing.REPEATS) * timing.LAUNCHES


def test_a_side_that_fails_costs_only_itself():
    def fail():
        raise ValueError("no such kernel")

    row = compare(lambda: {"engine": lambda: torch.ones(1), "compiled": fail, "script": lambda: torch.ones(1)})
    assert row["notes"] == {"compiled": "failed: no such kernel"}
    assert row["gain"].keys() == {"script"}
    with pytest.raises(RuntimeError, match="engine failed: no such kernel"):
        compare(lambda: {"engine": fail})


def test_a_copy_moves_bytes_that_no_hardware_compresses():
    target = timing.copying(2**17, CPU)()
    assert target.nbytes == 2**16
    assert torch.bincount(target.int(), minlength=256).min() > 150


def test_the_data_sheet_is_known_by_the_name_of_the_device():
    known = {
        "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989.4e12, "NVIDIA H200 NVL": 835.5e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "NVIDIA GH200 480GB": 989.4e12,
        "NVIDIA A10G": None, "NVIDIA L40": None, "CPU, AMD EPYC": None,
    }  # fmt: skip
    assert {name: timing.data_sheet_flops_per_second(name) for name in known} == known


def test_the_peak_is_the_median_after_a_warm_up(monkeypatch):
    """By a clock on which windows take 0.2 seconds until the device is warm, then 0.1, and one of five takes long."""
    taken = [0.2, 0.2, 0.1, 0.1, 9.0, 0.1, 0.1, 0.1]
    readings = iter([reading for number, seconds in enumerate(taken) for reading in (10.0 * number, 10.0 * number + seconds)])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(readings))
    assert flops.matrix_flops_per_second(CPU, torch.float32) == pytest.approx(2 * 1024**3 * 5 / 0.1)
    assert next(readings, None) is None
