"""The gradient noise scale against a direct computation from the gradients, and where it is refused."""

import json

import pytest
import torch

from engine.config.checks import check_options
from engine.errors import UserError
from engine.loop.noise_scale import KEPT
from engine.loop.step import Step
from engine.loop.trainer import train
from tests.loop.runs import config

OPTIONS = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "gradient_noise_scale": True, "max_train_steps": 4,
           "max_grad_norm": 0.1, "use_ema": False}  # fmt: skip


def logged(output) -> list[float | None]:
    return [json.loads(line)["gradient_noise_scale"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def of(averages: list[float], small: int, large: int) -> float | None:
    """Appendix A.1 of arXiv:1812.06162."""
    signal = (large * averages[1] - small * averages[0]) / (large - small)
    noise = (averages[0] - averages[1]) / (1 / small - 1 / large)
    return noise / signal if noise > 0 and signal > 0 else None


@pytest.mark.parametrize("stage", [0, 2])
def test_it_is_that_of_the_gradients_of_every_micro_batch(stage, model, images, shards, tmp_path, monkeypatch):
    gradients: list[list[torch.Tensor]] = []
    differentiate = Step.differentiate

    def kept(self, batch):
        loss, found = differentiate(self, batch)
        gradients.append([gradient.double().clone() for gradient in found])
        return loss, found

    monkeypatch.setattr(Step, "differentiate", kept)
    assert train(config(model, images, shards, tmp_path / "out", cuda_graphs="off", zero_stage=stage, **OPTIONS)) == 0
    averages, expected = [0.0, 0.0], []
    for parts in zip(*[iter(gradients)] * 3, strict=True):
        small = sum(9 * each.square().sum().item() for part in parts for each in part) / 3
        large = sum(sum(tensors).square().sum().item() for tensors in zip(*parts, strict=True))
        averages = [KEPT * old + (1 - KEPT) * new for old, new in zip(averages, (small, large), strict=True)]
        expected.append(of(averages, 2, 6))
    assert len(expected) == 4
    assert any(expected)
    assert logged(tmp_path / "out") == [value if value is None else pytest.approx(value, rel=1e-3) for value in expected]


def test_a_resume_and_graphs_go_on_exactly(recorded, model, images, shards, tmp_path):
    run = OPTIONS | {"max_train_steps": 6, "checkpointing_steps": 2}
    assert train(config(model, images, shards, tmp_path / "whole", cuda_graphs="on", **run)) == 0
    assert recorded
    halves = tmp_path / "halves"
    assert train(config(model, images, shards, halves, cuda_graphs="off", **run | {"max_train_steps": 2})) == 0
    assert train(config(model, images, shards, halves, cuda_graphs="off", **run, resume_from_checkpoint="latest")) == 0
    assert logged(halves) == logged(tmp_path / "whole")


def check_and_train(config) -> None:
    check_options(config)
    train(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 1}, "give --gradient_accumulation_steps 2 or more"),
        ({"zero_stage": 3}, "--zero_stage 3, which never has a whole gradient; use --zero_stage 2"),
        ({"timestep_sampling": "stratified"}, "--timestep_sampling stratified, .* leave one out"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16, whose loss scale changes; use bf16 or no"),
    ],
    ids=str,
)
def test_it_is_refused_where_it_cannot_be_had(options, message, model, images, shards, tmp_path):
    run = config(model, images, shards, tmp_path / "out", **OPTIONS | options)
    with pytest.raises(UserError, match=message):
        check_and_train(run)
