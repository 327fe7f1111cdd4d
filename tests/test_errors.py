"""What the disk did is told from what the program did."""

import errno
import pickle
import subprocess
import sys

import pytest

from engine.errors import UserError, disk_problem, exit_code, first_line, of_all
from engine.storage import StorageError


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EROFS, "x"), "Read-only file system"),
        (PermissionError(errno.EACCES, "x"), "Permission denied"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left on device"),
        (OSError(errno.ESTALE, "x"), "Stale file handle"),
        (OSError(errno.ENOENT, "x", "out/latest"), "No such file or directory"),
        (OSError(errno.ENOENT, "x"), None),
        (RuntimeError("something else"), None),
    ],
    ids=str,
)
def test_full_and_read_only_disks_are_recognised(error, problem):
    assert disk_problem(error) == problem


def test_a_full_disk_is_one_line_and_exit_code_2(capsys):
    def main() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl")

    assert exit_code("engine.run", main) == 2
    said = capsys.readouterr().err
    assert said.startswith("engine.run: error: out/metrics.jsonl: No space left on device; mend what")
    assert len(said.splitlines()) == 1


def test_other_exceptions_keep_their_trace():
    def main() -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        exit_code("engine.run", main)


@pytest.mark.parametrize(
    "said",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. More",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.27",
    ],
)
def test_a_process_that_lost_another_says_so_in_one_line(said, monkeypatch, capsys):
    def main() -> int:
        raise RuntimeError(said)

    monkeypatch.setenv("RANK", "3")
    assert exit_code("engine.run", main) == 75
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("engine.run: error: process 3: another process is gone")


def test_a_mistake_is_exit_code_2(capsys):
    def main() -> int:
        raise UserError("--this is wrong")

    assert exit_code("engine.run", main) == 2
    assert capsys.readouterr().err == "engine.run: error: --this is wrong\n"


def test_user_errors_are_printed_once_per_node(monkeypatch, capsys):
    def fail() -> int:
        raise UserError("no")

    monkeypatch.setenv("LOCAL_RANK", "3")
    assert exit_code("program", fail) == 2
    assert capsys.readouterr().err == ""


def test_an_error_of_one_process_alone_is_printed_by_it(monkeypatch, capsys):
    def fail() -> int:
        raise UserError("this disk", alone=True)

    monkeypatch.setenv("LOCAL_RANK", "3")
    assert exit_code("program", fail) == 2
    assert capsys.readouterr().err == "program: error: this disk\n"


def test_each_mistake_has_its_line(capsys):
    def fail() -> int:
        raise UserError("one", "two")

    assert exit_code("program", fail) == 2
    assert capsys.readouterr().err == "program: error: one\nprogram: error: two\n"


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 15 GiB"), RuntimeError("CUDA out of memory. Tried to")], ids=str
)
def test_memory_that_runs_out_is_one_line(error, capsys):
    def fail() -> int:
        raise error

    assert exit_code("program", fail) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"program: error: out of memory: {error}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("ending", ["return 0", "raise SystemExit(0)"])
def test_output_that_nobody_reads_ends_quietly(ending):
    code = f"""
import sys
from engine.errors import exit_code
def main():
    print("x" * 100_000)
    {ending}
sys.exit(exit_code("program", main))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_a_pipe_to_another_process_keeps_its_trace():
    def main() -> int:
        raise BrokenPipeError(errno.EPIPE, "to a process of ours")

    with pytest.raises(BrokenPipeError):
        exit_code("program", main)


def test_what_is_quoted_neither_breaks_a_line_nor_reaches_the_terminal(capsys):
    def fail() -> int:
        raise UserError("a\nb\x1b[2J\u202ec \u2028", f"{'x' * 5000}: no")

    assert exit_code("program", fail) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == r"program: error: a\nb\x1b[2J\u202ec \u2028"
    assert len(second) < 1100
    assert second.endswith("xxx: no")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), "No such file: a"),
        (KeyError("step"), "there is no 'step' in it"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n"), "ValueError"),
        (ValueError(), "ValueError"),
    ],
    ids=str,
)
def test_an_exception_says_one_line(error, said):
    assert first_line(error) == said


def test_a_mistake_travels_whole_between_processes_and_is_one_of_all():
    first, second = UserError("a full disk", "two\nlines", alone=True, passing=True), StorageError("no network", passing=True)
    for error in (first, second):
        told = pickle.loads(pickle.dumps(error))
        assert (type(told), str(told), vars(told)) == (type(error), str(error), vars(error))
    both = of_all([first, second, first])
    assert (both.lines, both.alone, both.shared, both.passing) == (
        ["a full disk", "two\\nlines", "no network"],
        False,
        True,
        True,
    )
    assert not of_all([first, UserError("a bad option")]).passing, "which the next attempt would meet again"
