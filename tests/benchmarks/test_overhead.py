"""What the loop takes beside its parts, and what the device waits for."""

import sys

import torch

from benchmarks.operations import attention
from benchmarks.steps import overhead
from benchmarks.tools.checkpoints import open_checkpoint
from benchmarks.tools.levers import EAGER
from engine.errors import TRY_AGAIN


def test_what_is_idle_between_kernels_is_found(tmp_path):
    gaps = overhead.device_gaps(open_checkpoint("kandinsky-prior", tmp_path, torch.device("cpu")), EAGER, 2, steps=2)
    assert gaps["kernels_per_step"] > 50
    assert 0 <= gaps["idle_share"] < 1
    assert "idles for" in overhead.table([{"captured_step": gaps}])


def test_benchmarks_that_lack_a_row_say_so(tmp_path, monkeypatch):
    for module, arguments in ((attention, ["--checkpoints", "kandinsky-prior"]), (overhead, [])):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--json", str(tmp_path / "rows.json"), "--minutes", "0", *arguments])
        assert module.main() == TRY_AGAIN
