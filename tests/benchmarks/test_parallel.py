"""What a process of the comparison trains, and what it says that a step sends."""

import json
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from benchmarks.runs import parallel
from benchmarks.tools.cost import payload
from benchmarks.tools.traffic import Collectives
from tests import in_process


def test_collectives_are_counted_by_the_whole_that_they_move():
    numbers = torch.ones(100)
    with Collectives() as collectives:
        dist.all_reduce(numbers)
        dist.all_reduce(torch.ones(1))
        dist.all_gather_into_tensor(torch.empty(100), numbers)
        dist.reduce_scatter_tensor(torch.empty(100), numbers)
    assert collectives.reduced == 2 * numbers.nbytes
    assert collectives.gathered == numbers.nbytes
    assert "allreduce" in collectives.bytes


def test_a_process_trains_and_notes_what_a_step_sends(tmp_path, monkeypatch):
    """In a world of one, where DeepSpeed reduces all the same and has nothing to gather."""

    def run(command, **unused):
        return in_process.run([sys.executable, *command[command.index("-m", 2) :]])

    family, output = "kandinsky-prior", tmp_path / "out"
    monkeypatch.setattr(parallel, "FAMILIES", {family: ("prior", 32)})
    monkeypatch.setattr(parallel, "subprocess", SimpleNamespace(run=run))
    place = parallel.Place(tmp_path)
    place.train(family, output, world=1, stage=2, steps=2)
    note = json.loads((tmp_path / "out.rank-0.json").read_text())
    assert note["reduced"] == payload(2, note["parameters"], bytes_per_number=4)["reduced"]
    assert (note["gathered"], note["ema_numbers"]) == (0, note["parameters"])
    weights, start = place.weights(family, output), place.untrained(family)
    assert parallel.distance(weights, weights, start) == 0
    assert parallel.distance(start, weights, start) == 1
