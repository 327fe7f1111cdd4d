"""DeepSpeed beside a captured step."""

import pytest
import torch

from engine.loop import capture, trainer
from engine.loop.trainer import train
from tests.loop.runs import config


def accumulates_beyond_the_step(parameter: torch.Tensor) -> bool:
    """Whether someone holds the parameter's AccumulateGrad node: a note left on it is there on the next look."""
    torch.autograd.graph.get_gradient_edge(parameter).node.metadata["seen"] = True
    return "seen" in torch.autograd.graph.get_gradient_edge(parameter).node.metadata


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_stage": 1},
        {"zero_stage": 1, "mixed_precision": "bf16"},
        {"zero_stage": 1, "gradient_accumulation_steps": 2},
        {"zero_stage": 2, "gradient_checkpointing": True},
        {"zero_stage": 2, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_no_accumulation_node_outlives_a_step(options, model, images, tmp_path, monkeypatch):
    # Such a node is bound to the stream on which it was made, and draws it into a later capture, which fails by it. This is
    # the first step, which runs as it is: a recording in a graph's place would hold nodes itself.
    monkeypatch.setattr(capture, "reason_against", lambda *arguments: None)
    kept, train_step = [], trainer.Training._train_step

    def note(self, batches, rate):
        train_step(self, batches, rate)
        kept.extend(name for parameter, name in self.partition.names.items() if accumulates_beyond_the_step(parameter))

    monkeypatch.setattr(trainer.Training, "_train_step", note)
    run = config(model, images, tmp_path / "shards", tmp_path / "out", cuda_graphs="on", max_train_steps=1, **options)
    assert train(run) == 0
    assert not kept
