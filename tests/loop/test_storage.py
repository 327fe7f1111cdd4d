"""Storage that fails at any operation costs a restart at the most: never a trace, other weights, or half a file.

`python -m benchmarks.runs.storage` sweeps over all operations; here each kind of fault is met once, at instants that are spread
over the life of a run.
"""

import pytest
import torch

from benchmarks.runs.storage import FAULTS, Trial
from benchmarks.tools.place import Place
from benchmarks.tools.preloaded import can_be_built
from benchmarks.tools.storage import Fault, FaultyRuns, instants, unsynced

pytestmark = [
    pytest.mark.skipif(not can_be_built(), reason="needs Linux and g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork"),
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    with FaultyRuns() as runs:
        yield Trial(Place(tmp_path_factory.mktemp("storage")), runs)


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_goes_on_or_says_why_and_the_next_ends_in_the_same_weights(name, trial):
    fault = FAULTS[name]
    chosen = instants(trial.operations[fault.operations])
    number = list(FAULTS).index(name)
    at = chosen[len(chosen) * (2 * number + 1) // (2 * len(FAULTS))]
    result = trial.meet(Fault(fault.operations, at, fault.action, fault.lasting))
    assert not result["wrong"], (trial.operations[fault.operations][at - 1], result)
    if fault.action == "kill":
        assert result["status"] == -9


def test_no_file_comes_under_its_name_before_it_is_synced(trial):
    assert not list(unsynced(trial.operations["changes"]))


def test_what_is_renamed_unsynced_is_found():
    written = [["open", "a/b.partial"], ["write", "a/b.partial"]]
    rename = ["rename", "a", "c"]
    assert list(unsynced([*written, rename])) == ["c/b.partial"]
    assert not list(unsynced([*written, ["fsync", "a/b.partial"], rename]))
    assert list(unsynced([*written, ["fsync", "a/b.partial"], ["write", "a/b.partial"], rename])) == ["c/b.partial"]


def test_of_many_alike_the_first_the_middle_and_the_last_are_chosen():
    assert instants([["write", "a"]] * 5 + [["fsync", "a"]] + [["write", "b"]] * 2) == [1, 3, 5, 6, 7, 8]
