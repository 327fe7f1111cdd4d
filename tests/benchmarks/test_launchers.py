"""What a launcher does with a signal; `python -m benchmarks.runs.launchers` asks each of them."""

from benchmarks.runs.launchers import signalled, table


def test_torchrun_waits_for_what_saves_and_says_that_it_failed():
    result = signalled("torchrun", "SIGTERM", "launcher", 0.5)
    assert result["exit_code"] == 1
    assert all(0.5 <= seconds < 10 for seconds in result["lived"])


def test_the_table_says_who_was_left_how_long():
    row = {
        "launcher": "deepspeed",
        "signal": "SIGTERM",
        "to": "launcher",
        "lived": [30.1, 0.0, 160.0],
        "exit_code_when_left": 1,
    }
    assert "| 30, not told, no limit | 1 |" in table([row])
