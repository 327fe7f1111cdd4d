"""DeepSpeed beside a captured step."""

import json

import pytest
import torch

from engine.loop import capture, trainer
from engine.loop.partition import Partition
from engine.loop.trainer import train
from engine.loop.zero import ZeroPartition
from tests.loop.runs import checkpoint_tensors, config


def small_buckets(directory) -> str:
    """A file of options for DeepSpeed: many buckets, and parameters that are larger than one."""
    file = directory / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5000}}))
    return str(file)


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


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"zero_stage": 1}, True),
        ({"zero_stage": 2}, True),
        ({"zero_stage": 2, "gradient_accumulation_steps": 2}, True),
        ({"zero_stage": 2, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}, True),
        # Two micro-batches add up in the first one's `.grad`, which the second may not overwrite.
        ({"zero_stage": 1, "gradient_accumulation_steps": 2}, False),
    ],
    ids=str,
)
def test_gradients_are_taken_as_they_are(options, taken, recorded, model, images, tmp_path, monkeypatch):
    landed: list[int] = []
    shared: list[float] = []
    create, receive = Partition.__init__, ZeroPartition.receive

    def watch(self, module, processes):
        create(self, module, processes)
        # Before DeepSpeed's hooks, which move gradients on.
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(lambda parameter: landed.append(parameter.grad.data_ptr()))

    def note(self, gradients, first):
        landed.clear()
        receive(self, gradients, first)
        assert len(landed) == len(gradients)
        shared.append(len({gradient.data_ptr() for gradient in gradients} & set(landed)) / len(landed))

    monkeypatch.setattr(Partition, "__init__", watch)
    monkeypatch.setattr(ZeroPartition, "receive", note)
    run = {"max_train_steps": 6, "checkpointing_steps": 6, "deepspeed_config": small_buckets(tmp_path), **options}
    for name, how in (("captured", "on"), ("eager", "off")):
        assert train(config(model, images, tmp_path / "shards", tmp_path / name, cuda_graphs=how, **run)) == 0
    assert recorded
    assert set(shared) == {float(taken)}
    weights = [checkpoint_tensors(tmp_path / name / "checkpoint-6", "weight") for name in ("captured", "eager")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
