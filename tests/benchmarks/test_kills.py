"""Who writes shards may be killed at any operation. `python -m benchmarks.data.kills` sweeps over all; here are a few."""

import pytest

from benchmarks.data.kills import Trial
from benchmarks.tools.place import Place
from benchmarks.tools.preloaded import can_be_built
from benchmarks.tools.storage import FaultyRuns, instants

pytestmark = pytest.mark.skipif(not can_be_built(), reason="needs Linux and g++")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def runs():
    with FaultyRuns() as runs:
        yield runs


@pytest.mark.parametrize("name", ["growing", "converting"])
def test_a_killed_writer_loses_nothing_and_the_same_command_ends_in_the_same_files(name, place, runs):
    trial = Trial(place, runs, name)
    renamed = [at for at in instants(trial.operations) if trial.operations[at - 1][0] == "rename"]
    for at in (renamed[0], renamed[-1]):
        assert not trial.meet(at), trial.operations[at - 1]
