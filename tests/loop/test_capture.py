"""The captured step: replayed training is eager training, bit for bit; and when it is refused.

Without a GPU a recording of the step's operations stands in for the graph (`tape.py`): it freezes what a graph freezes.
"""

import itertools
import json
import sys
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from engine.data.samples.batch import Batch
from engine.errors import UserError
from engine.loop import capture, trainer
from engine.loop.report import how_steps_run
from engine.loop.step import Step
from engine.loop.trainer import train
from engine.processes import Processes
from tests.commands import ON_GPU, start_two
from tests.loop.runs import checkpoint_tensors, config
from tests.loop.test_families import config as family_config

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def lines(output) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 3}, 1),
        (
            {
                "gradient_accumulation_steps": 3,
                "noise_offset": 0.1,
                "input_perturbation": 0.1,
                "pyramid_noise_discount": 0.5,
                "loss_type": "huber",
                "timestep_sampling": "stratified",
            },
            3,
        ),
        ({"mixed_precision": "bf16"}, 1),
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, 2),
        ({"gradient_checkpointing": True, "dream_training": True}, 1),
        ({"zero_stage": 1, "lr_scheduler": "linear", "lr_warmup_steps": 3}, 1),
        ({"zero_stage": 1, "gradient_accumulation_steps": 2}, 1),
        ({"zero_stage": 2, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}, 1),
        ({"zero_stage": 2, "dream_training": True}, 1),
        ({"cache_text": "tokens", "dream_training": True, "gradient_accumulation_steps": 2}, 2),
        ({"cache_text": "tokens", "zero_stage": 1}, 1),
        ({"train_text_encoder": True, "gradient_checkpointing": True, "mixed_precision": "bf16"}, 1),
        ({"train_text_encoder": True, "zero_stage": 1}, 1),
    ],
    ids=str,
)
def test_replayed_training_is_eager_training(options, graphs, recorded, model, images, tmp_path):
    run = {"max_train_steps": 8, "checkpointing_steps": 8, "snr_gamma": 5.0, **options}
    for name, how in (("eager", "off"), ("captured", "on")):
        assert train(config(model, images, tmp_path / "shards", tmp_path / name, cuda_graphs=how, **run)) == 0
    assert len(recorded) == graphs
    assert lines(tmp_path / "captured") == lines(tmp_path / "eager")
    for kind in KINDS:
        eager, replayed = (checkpoint_tensors(tmp_path / name / "checkpoint-8", kind) for name in ("eager", "captured"))
        assert eager.keys() == replayed.keys()
        assert all(torch.equal(eager[name], replayed[name]) for name in eager), kind


def test_a_step_that_is_not_finite_is_skipped_in_a_graph_too(recorded, model, images, shards, tmp_path, monkeypatch):
    masters, train_step = [], Step.__call__

    def spoil(self, batches, number):
        def spoiled():
            for batch in batches:
                if number == 6:
                    batch.record["latent_mean"][:] = float("nan")
                yield batch

        train_step(self, spoiled(), number)
        masters.append(self.partition.masters[0].detach().clone())

    monkeypatch.setattr(Step, "__call__", spoil)
    # A sample prediction compares with the latents: what is not finite in them reaches the loss.
    assert train(config(model, images, shards, tmp_path / "out", cuda_graphs="on", prediction_type="sample")) == 0
    assert recorded
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(masters)]
    assert moved == [True, True, True, True, False, True, True]
    assert bool(masters[-1].isfinite().all())


class BrokenGraph:
    """`torch.cuda.graph` around a capture that an operation invalidated: ending it fails too, in place of what went wrong."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("how", ["auto", "on"])
def test_a_capture_that_fails_ends_the_run_with_what_went_wrong_first(
    how, recorded, model, images, shards, tmp_path, monkeypatch, capsys
):
    def fail(function, stream, pool):
        with BrokenGraph():
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(capture, "capture", fail)
    said = "capturing the step as a CUDA graph failed: CUDA error: operation not permitted; start again with --cuda_graphs off"
    with pytest.raises(UserError, match=f"^{said}$"):
        train(config(model, images, shards, tmp_path / "out", cuda_graphs=how))
    assert len(lines(tmp_path / "out")) == capture.WARM_UP
    assert train(config(model, images, shards, tmp_path / "plain", cuda_graphs="off")) == 0


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), UserError("--attention cudnn: no kernel")], ids=repr)
def test_what_is_no_failure_of_capturing_stays_what_it_is(raised, recorded, model, images, shards, tmp_path, monkeypatch):
    def fail(function, stream, pool):
        with BrokenGraph():
            raise raised

    monkeypatch.setattr(capture, "capture", fail)
    with pytest.raises(type(raised)) as caught:
        train(config(model, images, shards, tmp_path / "out"))
    assert caught.value is raised


FAILS_ON_ONE = """
import sys
import torch
from engine.data.samples.batch import Batch
from engine.errors import exit_code
from engine.loop import capture
from engine.processes import Processes

def fail_on_one(function, stream, pool):
    if processes.rank == 1:
        raise ValueError("out of shared memory")
    return function, None

def main():
    captured = capture.Captured(lambda batch: None, processes)
    try:
        for call in range(5):
            captured(Batch({}, torch.zeros(1), torch.zeros(1), torch.zeros(5, 1), torch.zeros(1)))
        processes.wait_for_all()
    finally:
        processes.close()
    return 0

processes = Processes(device=torch.device("cpu")).connect()
capture.capture = fail_on_one
sys.exit(exit_code("engine.run", main))
"""


def test_a_capture_that_fails_on_one_process_ends_all_of_them():
    """Without a collective: where there are several shapes, processes come to capture them at steps of their own."""
    both = start_two([sys.executable, "-c", FAILS_ON_ONE])
    assert [process.wait() for process in both] == [75, 2], both[0].errors
    said = "capturing the step as a CUDA graph failed on process 1: out of shared memory; start again with --cuda_graphs off"
    assert both[1].errors == f"engine.run: error: {said}\n"
    assert "process 0: process 1 left" in both[0].errors


def test_a_new_shape_has_the_memory_of_the_graphs_first(recorded):
    """And what calls return lies in one place, whatever shape they are of."""

    def function(batch, last):
        return batch.record["x"].flatten(1).sum(1) + last, [batch.record["x"].mean((0, 2))]

    captured = capture.Captured(function, Processes(device=DEVICE), [(False,), (True,)])
    graphs, places = [], set()
    for number, width in enumerate([2, 2, 2, 3, 2, 3, 4, 4, 3, 2]):
        x = torch.full((5, 3, width), float(number), device=DEVICE)
        for last in (False, True):
            if last or width != 4:  # kinds warm up in whatever shape
                batch = Batch({"x": x}, *(torch.zeros(1, device=DEVICE) for _ in range(4)))
                loss, (mean,) = captured(batch, last)
                assert torch.equal(loss, x.flatten(1).sum(1) + last)
                assert torch.equal(mean, x.mean((0, 2)))
                places.add((last, mean.data_ptr()) if captured.graphs else None)
        graphs.append(captured.graphs)
    # Warm; a new shape; both captured; a third, and all are captured again as they come.
    assert graphs == [0, 0, 0, 2, 4, 4, 0, 2, 4, 6]
    assert captured.captures == 5
    assert len(places - {None}) <= 2 * 2, "one for each kind, until the graphs were given back"


def test_what_shares_a_pool_gives_it_back_before_another_runs_as_it_is(recorded):
    processes, batch = Processes(device=DEVICE), Batch({"x": torch.ones(2, device=DEVICE)}, *torch.zeros(4, 1, device=DEVICE))
    step = capture.Captured(lambda batch: batch.record["x"] * 2, processes)
    other = capture.Captured(lambda batch: batch.record["x"] * 3, processes, beside=step)
    graphs = []
    for captured in [step] * 4 + [other] * 4 + [step, other]:
        assert captured(batch).tolist() == [2.0 if captured is step else 3.0] * 2
        graphs.append((step.graphs, other.graphs))
    assert graphs == [(0, 0)] * 3 + [(1, 0)] + [(0, 0)] * 3 + [(0, 1), (1, 1), (1, 1)]
    other.release()
    assert step.graphs == other.graphs == 0


@pytest.mark.parametrize("accumulation", [1, 4])
def test_nothing_is_captured_before_every_kind_of_micro_batch_has_warmed_up(
    accumulation, recorded, model, images, shards, tmp_path, monkeypatch
):
    happened: list[str] = []
    on_stream, real = capture.Captured._on_stream, capture.capture

    def note_capture(*arguments):
        happened.append("capture")
        return real(*arguments)

    def note_call(self, work):
        happened.append("as it is")
        return on_stream(self, work)

    monkeypatch.setattr(capture, "capture", note_capture)
    monkeypatch.setattr(capture.Captured, "_on_stream", note_call)
    options = {"train_batch_size": 1, "max_train_steps": 5, "cuda_graphs": "on"}
    assert train(config(model, images, shards, tmp_path / "out", gradient_accumulation_steps=accumulation, **options)) == 0
    assert happened == ["as it is"] * (capture.WARM_UP * accumulation) + ["capture"] * min(accumulation, 3)


@pytest.mark.parametrize("options", [{}, {"zero_stage": 1}, {"zero_stage": 2}], ids=str)
def test_validation_has_the_memory_of_the_graphs(options, recorded, model, images, shards, tmp_path, monkeypatch):
    graphs: list[weakref.ref] = []
    results: list[StorageWeakRef] = []
    at_validation: list[int] = []
    real, validate = capture.capture, trainer.validate

    def note(function, stream, pool):
        replay, result = real(function, stream, pool)
        graphs.append(weakref.ref(replay))
        results.extend(StorageWeakRef(part.untyped_storage()) for part in tree_leaves(result) if part is not None)
        return replay, result

    def count(*arguments):
        at_validation.append(sum(graph() is not None for graph in graphs) + sum(not part.expired() for part in results))
        return validate(*arguments)

    monkeypatch.setattr(capture, "capture", note)
    monkeypatch.setattr(trainer, "validate", count)
    run = {"cuda_graphs": "on", **options}
    drawn = {"validation_prompts": ["a red square"], "validation_epochs": 1}
    assert train(config(model, images, shards, tmp_path / "drawn", **run, **drawn)) == 0
    assert train(config(model, images, shards, tmp_path / "plain", **run)) == 0
    assert len(recorded) == 3, "captured at steps 4 and 7, and in the run without validation"
    assert at_validation == [0, 0, 0]  # after steps 3, 6 and 8
    assert lines(tmp_path / "drawn") == lines(tmp_path / "plain")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"zero_stage": 1}, {"gradient_accumulation_steps": 2}], ids=str)
def test_no_segment_of_the_graphs_pool_is_left_for_validation(options, recorded, model, images, shards, tmp_path, monkeypatch):
    pooled: list[int] = []
    release = capture.Captured.release

    def count(self):
        for _ in range(2):
            segments = torch.cuda.memory_snapshot()
            pooled.append(sum(piece["total_size"] for piece in segments if tuple(piece["segment_pool_id"]) != (0, 0)))
            release(self)

    monkeypatch.setattr(capture.Captured, "release", count)
    drawn = {"validation_prompts": ["a red square"], "cuda_graphs": "on"}
    assert train(config(model, images, shards, tmp_path / "out", **drawn, **options)) == 0
    before, after = pooled[-2:]
    assert before > 0
    assert after == 0


def test_what_cannot_be_captured_is_said():
    gpu = torch.device("cuda")
    drops = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    checkpointed = config("model", "images", "shards", "out", gradient_checkpointing=True)
    assert not capture.wanted(checkpointed, gpu, drops)
    assert how_steps_run(checkpointed, drops, gpu, False).startswith("not captured (--gradient_checkpointing keeps")
    assert capture.wanted(checkpointed.model_copy(update={"compile": True}), gpu, drops)
    assert capture.wanted(checkpointed, gpu, torch.nn.Linear(2, 2))
    off = checkpointed.model_copy(update={"cuda_graphs": "off"})
    assert not capture.wanted(off, gpu, torch.nn.Linear(2, 2))
    assert how_steps_run(off, drops, gpu, False).startswith("not captured (--cuda_graphs off)")


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_graphs_without_a_gpu_are_refused_only_when_asked_for(model, images, shards, tmp_path, capsys):
    with pytest.raises(UserError, match="--cuda_graphs on: there is no GPU; leave the option out"):
        train(config(model, images, shards, tmp_path / "out", cuda_graphs="on"))
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=1)) == 0
    assert "not captured (there is no GPU), not compiled" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["kandinsky-prior", "kandinsky-decoder", "wuerstchen"])
def test_compiled_steps_are_captured_and_compile_nothing_after_the_third(family, published, photographs, tmp_path):
    models = published(family)  # Wuerstchen's with its dropout, whose generator a graph must advance
    options = {"compile": True, "mixed_precision": "bf16", "shards_dir": str(tmp_path / "shards"), "max_train_steps": 8}
    losses = {}
    for how in ("off", "on"):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert train(family_config(family, models, photographs, tmp_path / how, cuda_graphs=how, **options)) == 0
        losses[how] = lines(tmp_path / how)
    assert losses["on"] == losses["off"]


def test_a_captured_step_keeps_weights_where_they_are(recorded, model, images, shards, tmp_path, monkeypatch):
    places, train_step = set(), Step.__call__

    def note(self, *arguments):
        train_step(self, *arguments)
        places.add(tuple(parameter.data_ptr() for parameter in self.partition.parameters))

    monkeypatch.setattr(Step, "__call__", note)
    assert train(config(model, images, shards, tmp_path / "out", cuda_graphs="on")) == 0
    assert len(places) == 1
