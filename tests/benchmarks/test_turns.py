"""Processes that trace beside each other have the GPU one after another."""

import fcntl

from torch._inductor import compile_fx

from benchmarks.tools.turns import Turn


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
