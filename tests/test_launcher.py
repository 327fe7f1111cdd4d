"""What a launcher says of a process."""

import pytest

from engine import launcher


@pytest.mark.parametrize(("environment", "given", "expected"), [("3", 1, 3), (None, 1, 1), (None, -1, 0)])
def test_the_environment_wins_over_the_option(environment, given, expected, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if environment:
        monkeypatch.setenv("LOCAL_RANK", environment)
    assert launcher.local_rank(given) == expected
