"""Jobs on nodes that see late what others did end as if they saw it at once. `python -m benchmarks.runs.cluster` knows more."""

import pytest
import torch

from benchmarks.runs.cluster import Trial, table
from benchmarks.tools.preloaded import can_be_built
from benchmarks.tools.shared import Cluster

pytestmark = [
    pytest.mark.skipif(not can_be_built(), reason="needs Linux and g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork"),
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster")
    with Cluster(root) as cluster:
        yield Trial(root, cluster)


@pytest.mark.parametrize("name", ["a node sees an older directory", "killed during publication"])
def test_a_job_ends_in_the_same_weights_or_in_lines(name, trial):
    row = trial.meet(name)
    assert not row["wrong"]
    assert not [line for line in row["said"] if "hold on one node only" in line]
    assert name in table([row])
