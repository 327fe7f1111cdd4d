"""In what precision gradients travel between processes."""

import json
import sys

import pytest
import torch

from engine.loop import overlap
from engine.loop.report import precision
from engine.loop.weights import zero_options
from engine.loop.weights.zero_options import FP32_REDUCTION, deepspeed_config, reduction_precision
from engine.processes import Processes
from tests.commands import run_two
from tests.loop.runs import config

PARAMETERS = 20 * 30 + 30 + 30 * 10 + 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes need two GPUs")
def test_many_processes_reduce_in_fp32_at_every_stage_and_in_every_way(tmp_path):
    rows, theirs = tmp_path / "rows", tmp_path / "deepspeed.json"
    theirs.write_text(json.dumps({"communication_data_type": "bf16"}))
    run_two([sys.executable, "-m", "tests.loop.reductions", str(rows), str(theirs)])
    counted = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(counted) == 2 * 7 * 2
    assert sum("below" in row for row in counted) == 7
    for row in counted:
        reductions = 1 if row["stage"] == 1 else row["micro_batches"]  # stage 1 reduces the sum of its micro-batches
        assert row["above"] == 4 * PARAMETERS * reductions, row
        if "below" in row:
            assert row["below"] == row["file"] == 2 * PARAMETERS * reductions, row
            assert row["above_weights"] == pytest.approx(row["below_weights"], rel=1e-2), row


def test_the_precision_of_reductions_is_the_files_else_by_the_number_of_processes(tmp_path, monkeypatch):
    run = config("model", "images", "shards", "out", mixed_precision="bf16", zero_stage=1)
    assert reduction_precision(run, FP32_REDUCTION - 1) == "bf16"
    assert reduction_precision(run, FP32_REDUCTION) == "fp32"
    assert precision(run, 8) == "bf16 with fp32 masters"
    assert precision(run, FP32_REDUCTION) == "bf16 with fp32 masters; gradients add up over processes in fp32"
    monkeypatch.setenv("WORLD_SIZE", str(FP32_REDUCTION))
    assert deepspeed_config(run, elements=4, overlap=False)["communication_data_type"] == "fp32"
    file = tmp_path / "deepspeed.json"
    for theirs, expected in (("BF16", "bf16"), ("auto", "fp32"), (None, "fp32"), ("fp16", "fp16")):
        file.write_text(json.dumps({"communication_data_type": theirs}))
        given = run.model_copy(update={"deepspeed_config": str(file)})
        assert deepspeed_config(given, elements=4, overlap=False)["communication_data_type"] == expected


def test_the_estimate_of_overlap_counts_the_bytes_of_fp32(monkeypatch):
    seen = []
    monkeypatch.setattr(overlap, "overlap_gain", lambda operations, reduction, *more: seen.append(reduction) or 0.0)
    monkeypatch.setattr(overlap, "reduction_seconds_per_byte", lambda processes: 1.0)
    processes = Processes()
    processes.world = 2
    monkeypatch.setattr(processes, "from_first", lambda value: value)
    run = config("model", "images", "shards", "out", mixed_precision="bf16")
    for threshold in (3, 2):
        monkeypatch.setattr(zero_options, "FP32_REDUCTION", threshold)
        overlap.overlap_pays(run, torch.nn.Linear(9, 10), overlap.Flops(step=1.0, per_second=1.0), processes)
    assert seen == [200, 400]
