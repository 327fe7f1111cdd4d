"""Some hundred mutations of every kind of file: each is refused in a line that says where, or read as what it is.

`python -m benchmarks.fuzz --kinds KIND --case N` runs the case that failed again.
"""

import pytest
import torch

from tests.fuzz import data, models, runs
from tests.fuzz.judge import FAULTS
from tests.fuzz.workers import outcomes

# Cases of a kind, by what one costs.
CASES = {
    "images": 400, "tables": 400, "archives": 400, "parquet": 100, "saved": 60, "shards": 150, "shards-index": 150,
    "shards-consistent": 150, "config": 100, "checkpoints": 60, "checkpoints-manifest": 100, "checkpoints-consistent": 60,
    "shards-version-1": 60,
}  # fmt: skip
OTHERS = 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
@pytest.mark.parametrize("kinds", [data.KINDS, runs.KINDS, models.KINDS], ids=["data", "runs", "models"])
def test_no_altered_file_ends_in_a_trace_or_goes_unnoticed(kinds, tmp_path):
    cases = ((kind, number, 0) for kind in kinds for number in range(CASES.get(kind, OTHERS)))
    faults = [outcome for outcome in outcomes(cases, tmp_path) if outcome.verdict in FAULTS]
    assert not faults, "\n".join(
        f"python -m benchmarks.fuzz --kinds {fault.kind} --case {fault.number}: {fault.verdict} {fault.where} {fault.said}"
        for fault in faults
    )
