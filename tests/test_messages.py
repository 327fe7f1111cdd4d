"""What is said meanwhile: by the first process alone, in lines where there is no terminal, and not more often than it helps."""

import io
import time

import pytest

from engine import messages
from engine.messages import Progress, busy, duration, say, warn


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    messages.begin(quiet=False)
    yield
    messages.begin(quiet=False)


def test_warnings_are_said_once_and_also_where_nothing_else_is(capsys):
    for quiet in (False, True):
        messages.begin(quiet)
        say("a line")
        warn("a fault")
        warn("a fault")
        said = capsys.readouterr()
        assert said.err == "warning: a fault\n" if quiet else "a line\nwarning: a fault\n"
        assert said.out == ""


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("a line")
    warn("a fault")
    assert capsys.readouterr().err == ""


def test_work_is_named_when_it_takes_longer(capsys, monkeypatch):
    monkeypatch.setattr(messages, "PATIENCE", 0.05)
    with busy("Short work"):
        pass
    with busy("Long work"):
        time.sleep(0.2)
    time.sleep(0.1)
    assert capsys.readouterr().err == "Long work ...\n"


def test_progress_is_lines_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: now[0])
    with Progress(1000, "Encoding", "image") as progress:
        for _ in range(1000):
            now[0] += 0.125
            progress.update()
    assert capsys.readouterr().err.splitlines() == [
        "Encoding: 16 of 1,000 images, 2 min left", "Encoding: 256 of 1,000 images, 93 s left",
        "Encoding: 496 of 1,000 images, 63 s left", "Encoding: 736 of 1,000 images, 33 s left",
        "Encoding: 976 of 1,000 images, 3 s left",
    ]  # fmt: skip


def test_progress_is_a_bar_in_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(3, "Encoding", "image") as progress:
        progress.update(3)
    assert "Encoding: 100%" in terminal.getvalue() or "Encoding:   0%" in terminal.getvalue()
    assert "images," not in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (6100, "1 h 42 min"), (2e5, "2 d 8 h")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said
