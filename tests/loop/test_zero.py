"""DeepSpeed beside a captured step."""

import json

import pytest
import torch

from engine.loop import capture, overlap
from engine.loop.flops import Flops
from engine.loop.step import Step
from engine.loop.trainer import train
from engine.loop.weights.partition import Partition
from engine.loop.weights.zero import ZeroPartition
from engine.loop.weights.zero_options import deepspeed_config
from engine.processes import Processes
from tests.commands import run_two
from tests.loop.runs import checkpoint_tensors, command, config


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
    kept, train_step = [], Step.__call__

    def note(self, *arguments):
        train_step(self, *arguments)
        kept.extend(name for parameter, name in self.partition.names.items() if accumulates_beyond_the_step(parameter))

    monkeypatch.setattr(Step, "__call__", note)
    first_step = {"cuda_graphs": "on", "max_train_steps": 1}
    assert train(config(model, images, tmp_path / "shards", tmp_path / "out", **first_step, **options)) == 0
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

    def watch(self, *arguments):
        create(self, *arguments)
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
    steps = {"max_train_steps": 6, "checkpointing_steps": 6, "deepspeed_config": small_buckets(tmp_path)}
    for name, how in (("captured", "on"), ("eager", "off")):
        assert train(config(model, images, tmp_path / "shards", tmp_path / name, cuda_graphs=how, **steps, **options)) == 0
    assert recorded
    assert set(shared) == {float(taken)}
    weights = [checkpoint_tensors(tmp_path / name / "checkpoint-6", "weight") for name in ("captured", "eager")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def gain(**changes) -> float:
    """Of 30 ms of reductions in 18 buckets, beside operations that keep the GPU ahead of the host."""
    return overlap.overlap_gain(**{"operations": 0.2, "reduction": 0.03, "tensors": 100, "buckets": 18} | changes)


def test_the_estimate_of_overlap():
    hidden = 0.03 * 17 / 18
    epilogue = 100 * overlap.EPILOGUE_SECONDS
    assert gain() == pytest.approx(hidden - epilogue)
    assert gain(buckets=1) == pytest.approx(-epilogue)
    # No more is hidden than the backward pass is long.
    assert gain(reduction=1.0) == pytest.approx(0.2 * 2 / 3 - epilogue)
    # Every micro-batch waits for the host; only what is reduced can be hidden.
    waiting = overlap.host_seconds(100) - 0.001
    assert gain(operations=0.001, micro_batches=4) == pytest.approx(0.002 / 3 - epilogue - 4 * waiting)
    assert gain(micro_batches=4, reductions=4) == pytest.approx(4 * gain())


@pytest.mark.parametrize(("seconds_per_byte", "chosen"), [(1e-6, "with reductions that overlap"), (1e-12, "from CUDA graphs")])
def test_auto_chooses_by_the_estimate_and_says_so(seconds_per_byte, chosen, monkeypatch, capsys):
    processes = Processes()
    processes.world, flops = 2, Flops(step=3e12, per_second=1e14)
    monkeypatch.setattr(overlap, "reduction_seconds_per_byte", lambda processes: seconds_per_byte)
    monkeypatch.setattr(overlap, "OVERLAPPED_BUCKET", 1000)
    monkeypatch.setattr(processes, "from_first", lambda value: value)
    options, model = config("model", "images", "shards", "out"), torch.nn.Linear(100, 100)
    assert overlap.overlap_pays(options, model, flops, processes) == chosen.startswith("with")
    assert capsys.readouterr().err.startswith(f"Training {chosen}")
    for changed in ({"cuda_graphs": "on"}, {"compile": True}, {"gradient_noise_scale": True}):
        assert not overlap.overlap_pays(options.model_copy(update=changed), model, flops, processes)
    processes.world = 1
    assert not overlap.overlap_pays(options, model, flops, processes)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes need two GPUs")
@pytest.mark.parametrize(
    "options", [{"zero_stage": 1, "gradient_accumulation_steps": 2}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str
)
def test_reductions_that_overlap_change_nothing(options, model, images, shards, tmp_path):
    # Two numbers have one sum in either order, so that the buckets do not show.
    apart = {"overlap_comm": False, "contiguous_gradients": options["zero_stage"] == 2}
    for name, zero in (("overlapped", {}), ("apart", apart)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 50_000, **zero}}))
        steps = {"max_train_steps": 4, "checkpointing_steps": 4, "train_batch_size": 2}
        run_two(command(config(model, images, shards, tmp_path / name, deepspeed_config=str(file), **steps, **options)))
    assert deepspeed_config(config("m", "i", "s", "o", zero_stage=1), 10**9, overlap=True)["zero_optimization"]["overlap_comm"]
    for kind in ("weight", "exp_avg", "ema"):
        parts = [checkpoint_tensors(tmp_path / name / "checkpoint-4", kind) for name in ("overlapped", "apart")]
        assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0]), kind
