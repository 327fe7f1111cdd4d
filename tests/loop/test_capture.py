"""The captured step: replayed training is eager training, bit for bit; and when it is refused.

Without a GPU a recording of the step's operations stands in for the graph (`tape.py`): it freezes what a graph freezes.
"""

import itertools
import json

import pytest
import torch

from engine.errors import UserError
from engine.loop import capture, trainer
from engine.loop.trainer import train
from tests.loop import tape
from tests.loop.runs import checkpoint_tensors, config
from tests.loop.test_families import config as family_config

ON_GPU = torch.cuda.is_available()
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    """Lets a CPU capture; returns what was captured."""
    captured: list[str] = []
    real = capture.capture if ON_GPU else tape.capture

    def note(function, stream, pool):
        captured.append("graph")
        return real(function, stream, pool)

    if not ON_GPU:
        monkeypatch.setattr(capture, "reason_against", lambda *arguments: None)
    monkeypatch.setattr(capture, "capture", note)
    return captured


def lines(output) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 3}, 1),
        ({"gradient_accumulation_steps": 3, "noise_offset": 0.1, "input_perturbation": 0.1}, 3),
        ({"mixed_precision": "bf16"}, 1),
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, 2),
        ({"gradient_checkpointing": True, "dream_training": True}, 1),
        ({"zero_stage": 1, "lr_scheduler": "linear", "lr_warmup_steps": 3}, 1),
        ({"zero_stage": 1, "gradient_accumulation_steps": 2}, 1),
        ({"zero_stage": 2, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}, 1),
        ({"zero_stage": 2, "dream_training": True}, 1),
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
    masters, train_step = [], trainer.Training._train_step

    def spoil(self, batches, rate):
        def spoiled():
            for number, batch in enumerate(batches):
                if self.step == 5 and number == 0:
                    batch.record["latent_mean"][:] = float("nan")
                yield batch

        train_step(self, spoiled(), rate)
        masters.append(self.partition.masters[0].detach().clone())

    monkeypatch.setattr(trainer.Training, "_train_step", spoil)
    # A sample prediction compares with the latents: what is not finite in them reaches the loss.
    assert train(config(model, images, shards, tmp_path / "out", cuda_graphs="on", prediction_type="sample")) == 0
    assert recorded
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(masters)]
    assert moved == [True, True, True, True, False, True, True]
    assert bool(masters[-1].isfinite().all())


def test_a_capture_that_fails_is_said_once_and_training_goes_on(recorded, model, images, shards, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(capture, "capture", fail)
    assert train(config(model, images, shards, tmp_path / "out")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert said == ["Training without CUDA graphs: capturing failed: operation not permitted"]
    assert train(config(model, images, shards, tmp_path / "plain", cuda_graphs="off")) == 0
    assert lines(tmp_path / "out") == lines(tmp_path / "plain")
    with pytest.raises(UserError, match="--cuda_graphs on: capturing failed: operation not permitted"):
        train(config(model, images, shards, tmp_path / "required", cuda_graphs="on"))


def test_what_cannot_be_captured_is_said_in_one_line(capsys):
    gpu = torch.device("cuda")
    drops = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    checkpointed = config("model", "images", "shards", "out", gradient_checkpointing=True)
    assert not capture.wanted(checkpointed, gpu, drops)
    assert capsys.readouterr().err.startswith("Training without CUDA graphs: --gradient_checkpointing keeps")
    assert capture.wanted(checkpointed.model_copy(update={"compile": True}), gpu, drops)
    assert capture.wanted(checkpointed, gpu, torch.nn.Linear(2, 2))
    assert not capture.wanted(checkpointed.model_copy(update={"cuda_graphs": "off"}), gpu, torch.nn.Linear(2, 2))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_graphs_without_a_gpu_are_refused_only_when_asked_for(model, images, shards, tmp_path, capsys):
    with pytest.raises(UserError, match="--cuda_graphs on: there is no GPU; leave the option out"):
        train(config(model, images, shards, tmp_path / "out", cuda_graphs="on"))
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=1)) == 0
    assert "CUDA graphs" not in capsys.readouterr().err


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
    places, train_step = set(), trainer.Training._train_step

    def note(self, batches, rate):
        train_step(self, batches, rate)
        places.add(tuple(parameter.data_ptr() for parameter in self.partition.parameters))

    monkeypatch.setattr(trainer.Training, "_train_step", note)
    assert train(config(model, images, shards, tmp_path / "out", cuda_graphs="on")) == 0
    assert len(places) == 1
