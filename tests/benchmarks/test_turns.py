"""Processes that trace beside each other have the GPU one after another."""

import fcntl

import pytest
from torch._inductor import compile_fx, config

from benchmarks.steps import step
from benchmarks.tools.turns import Turn, written_alone
from engine.errors import UserError


@config.patch(compile_threads=1000)
def test_a_turn_is_taken_when_compiled_code_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_fx, "compile_fx", lambda function: function)
    path = tmp_path / "turn"
    turn, other = Turn(path), path.open("w")

    def free():
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(other, fcntl.LOCK_UN)
        return True

    turn.take()
    turn.take()
    assert not free()
    assert config.compile_threads < 1000
    with turn.taken_by_compiled_code():
        compiled = compile_fx.compile_fx(lambda x: x + 1)
        assert free()
        assert compiled(1) == 2
        assert not free()
    assert not free()
    turn.give()
    assert free()
    assert compile_fx.compile_fx(len) is len


def test_without_a_file_nothing_is_taken(monkeypatch):
    monkeypatch.setattr(compile_fx, "compile_fx", lambda function: function)
    turn = Turn(None)
    turn.take()
    with turn.taken_by_compiled_code():
        assert compile_fx.compile_fx(len) is len
    turn.give()


@config.patch(compile_threads=1000)
def test_a_file_of_rows_is_written_by_one_process(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    command = ["step", "--tiny", "--turn", str(tmp_path / "turn"), "--json", str(file), "--minutes", "0"]
    monkeypatch.setattr("sys.argv", command)
    with written_alone(file), pytest.raises(UserError, match="another process writes it"):
        step.main()
    with written_alone(file):
        pass
