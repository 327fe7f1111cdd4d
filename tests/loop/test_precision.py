"""bf16 and fp16: fp32 master weights, loss scaling, and losses near those of fp32."""

import json

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from engine.errors import UserError
from engine.loop import trainer
from engine.loop.trainer import train
from tests.loop.runs import checkpoint_tensors, config


def losses(output) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def fp16_allowed(monkeypatch):
    """DeepSpeed declines fp16 on CPUs without fast kernels for it; torch's slow ones do for a test."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(precision, accumulation, fp16_allowed, model, images, tmp_path):
    options = {"gradient_accumulation_steps": accumulation, "checkpointing_steps": 8, "snr_gamma": 5.0}
    for name in ("no", precision):
        run = config(model, images, tmp_path / f"shards-{name}", tmp_path / name, mixed_precision=name, **options)
        assert train(run) == 0
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "no"), rel=0.03)
    masters = checkpoint_tensors(tmp_path / precision / "checkpoint-8", "weight")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}
    dtype = trainer.open_family(run).encoding.dtype
    assert not all(torch.equal(tensor, tensor.to(dtype).float()) for tensor in masters.values()), "masters are rounded"


def test_an_overflow_skips_the_step_and_lowers_the_scale(fp16_allowed, model, images, tmp_path, monkeypatch):
    scales, weights = [], []
    after_step = trainer.Training._after_step

    def note(self, *arguments):
        scales.append(self.partition.loss_scale)
        weights.append(self.partition.masters[0].detach().clone())
        after_step(self, *arguments)

    load = trainer.Training.__init__

    def with_huge_scale(self, *arguments):
        load(self, *arguments)
        self.partition.loss_scaler.cur_scale = 2.0**40

    monkeypatch.setattr(trainer.Training, "_after_step", note)
    monkeypatch.setattr(trainer.Training, "__init__", with_huge_scale)
    assert train(config(model, images, tmp_path / "shards", tmp_path / "out", mixed_precision="fp16", max_train_steps=40)) == 0
    assert scales[-1] < 2.0**40
    assert torch.equal(weights[0], weights[1]), "an overflowing step moved the weights"
    assert not torch.equal(weights[-1], weights[0]), "no step was taken after the scale came down"
    assert bool(weights[-1].isfinite().all())


def test_fp16_without_support_is_refused_before_anything_is_written(model, images, tmp_path):
    if get_accelerator().is_fp16_supported():
        pytest.skip("this device runs fp16")
    with pytest.raises(UserError, match="--mixed_precision fp16 is not supported on this cpu; use bf16"):
        train(config(model, images, tmp_path / "out" / "shards", tmp_path / "out", mixed_precision="fp16"))
    assert not (tmp_path / "out").exists()
