"""Counters speak of steps that the device has finished, not of those that it was given.

A device of this test's own finishes a step no earlier than somebody waits for it.
"""

import io
import os
import signal

import pytest
import torch
from tqdm import tqdm

from engine.loop import pace, trainer
from engine.loop.checkpoints.writer import Writer
from engine.loop.pace import AHEAD, Pace
from tests.loop.runs import config


class LazyDevice:
    """given: how many steps it was given; finished: how many of them somebody has waited for."""

    def __init__(self) -> None:
        self.given = self.finished = 0

    def event(self, device):
        return LazyEvent(self)


class LazyEvent:
    def __init__(self, device: LazyDevice) -> None:
        self.device, self.number = device, 0

    def record(self) -> None:
        self.device.given += 1
        self.number = self.device.given

    def synchronize(self) -> None:
        self.device.finished = max(self.device.finished, self.number)


@pytest.fixture
def device(monkeypatch) -> LazyDevice:
    device = LazyDevice()
    monkeypatch.setattr(pace, "device_event", device.event)
    return device


def test_the_host_is_never_more_than_two_steps_ahead(device):
    finished: list[int] = []
    steps = Pace(torch.device("cuda"), finished.append)
    for step in range(101, 106):
        steps.given(step)
        assert finished == list(range(101, step - AHEAD + 1)), "only what somebody waited for, and all of that"
        assert device.given - device.finished <= AHEAD
    steps.wait()
    assert finished == [101, 102, 103, 104, 105]
    steps.wait()
    assert finished == [101, 102, 103, 104, 105]


def test_a_step_of_the_cpu_is_finished_when_it_returns():
    finished: list[int] = []
    Pace(torch.device("cpu"), finished.append).given(7)
    assert finished == [7]


def test_the_watchdog_and_the_progress_count_finished_steps(device, model, images, shards, tmp_path, monkeypatch):
    seen, after_step, read = [], trainer.Training._after_step, trainer.Metrics.read

    def note(self, leave, save):
        assert self.progress.n == device.finished
        assert self.processes.step == device.finished
        seen.append((self.step, device.finished))
        after_step(self, leave, save)

    def read_finished(self, *arguments):
        assert device.given == device.finished, "the host would wait here on a clock that nobody advances"
        return read(self, *arguments)

    monkeypatch.setattr(trainer, "tqdm", lambda **options: tqdm(**(options | {"disable": False, "file": io.StringIO()})))
    monkeypatch.setattr(trainer.Training, "_after_step", note)
    monkeypatch.setattr(trainer.Metrics, "read", read_finished)
    assert trainer.train(config(model, images, shards, tmp_path / "out", log_every=5, step_timeout=600.0)) == 0
    assert seen == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 5), (7, 5), (8, 6)]


def test_a_signal_waits_for_no_more_than_the_steps_that_were_given(device, model, images, shards, tmp_path, monkeypatch):
    left, after_step, write = [], trainer.Training._after_step, Writer.save

    def note(self, leave, save):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if leave:
            left.append((self.step, device.given - device.finished))
        after_step(self, leave, save)

    def save_finished(self, *arguments):
        assert device.given == device.finished, "the time until here belongs to steps, and the watchdog counts it"
        write(self, *arguments)

    monkeypatch.setattr(trainer.Training, "_after_step", note)
    monkeypatch.setattr(Writer, "save", save_finished)
    assert trainer.train(config(model, images, shards, tmp_path / "out", log_every=100, max_train_steps=100)) == 0
    assert left == [(6, AHEAD)]
    assert (tmp_path / "out" / "checkpoint-6").is_dir()
