"""What a launcher says of a process."""

import pytest

from engine import launcher


@pytest.mark.parametrize(("environment", "given", "expected"), [("3", 1, 3), (None, 1, 1), (None, -1, 0)])
def test_the_environment_wins_over_the_option(environment, given, expected, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if environment:
        monkeypatch.setenv("LOCAL_RANK", environment)
    assert launcher.local_rank(given) == expected


def test_the_attempts_of_torchrun_have_in_common_what_no_other_has(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    told = []
    for attempt in ("one/attempt_0/0", "one/attempt_1/3", "two/attempt_0/0"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/none_{attempt}/error.json")
        told.append(launcher.launch())
    assert told == ["/tmp/none_one", "/tmp/none_one", "/tmp/none_two"]
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert launcher.launch() == ""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS_PER_NODE": "1"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "16"}, 8),
    ],
)
def test_every_launcher_says_how_many_processes_a_node_has(environment, expected, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "8"} | environment).items():
        monkeypatch.setenv(name, value)
    assert launcher.local_world() == expected
