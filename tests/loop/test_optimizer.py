"""Clipping inside AdamW, its refusal of non-finite gradients, the schedules and the moving average."""

import sys
import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from engine.config.options import TrainConfig
from engine.loop.optimizers import create_optimizer
from engine.loop.optimizers.adamw import AdamW
from engine.loop.optimizers.groups import Group
from engine.loop.optimizers.interface import Optimizer
from engine.loop.optimizers.rates import peak_rate, rate_factors
from engine.loop.weights import flat
from engine.loop.weights import partition as weights_partition
from engine.loop.weights.ema import Ema, decay_of_step
from engine.processes import Processes

WEIGHTS = [Group("weights", 1e-3)]
ARGUMENTS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in (12, 5, 1)]


def adamw(masters: list[torch.Tensor], max_norm: float, sum_parts=None, **beside) -> AdamW:
    optimizer = AdamW([{"name": "weights", "params": masters}], max_norm, sum_parts, **ARGUMENTS)
    optimizer.create_state(masters, torch.zeros_like, **beside)
    optimizer.set_rates(1.0)
    return optimizer


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_steps_are_those_of_clipping_and_adamw(max_norm):
    ours, theirs = parameters(), parameters()
    mine = adamw(ours, max_norm)
    plain = torch.optim.AdamW(theirs, **ARGUMENTS)
    for step in range(5):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn(left.shape, generator=torch.Generator().manual_seed(step))
            right.grad = left.grad.clone()
        mine.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm if max_norm else float("inf"))
        plain.step()
        torch.testing.assert_close(mine.norm_and_skips()[0], norm)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_groups_step_by_their_own_options():
    ours, theirs = parameters(), parameters()
    options = [{"lr": 1e-2, "weight_decay": 0.3}, {"lr": 3e-3, "betas": (0.5, 0.9)}, {"eps": 1e-2}]
    groups, plain_groups = (
        [
            {"name": f"{number}", "params": [weight], **own}
            for number, (weight, own) in enumerate(zip(weights, options, strict=True))
        ]
        for weights in (ours, theirs)
    )
    mine, plain = AdamW(groups, 1.0, None, **ARGUMENTS), torch.optim.AdamW(plain_groups, **ARGUMENTS)
    mine.create_state(ours, torch.zeros_like)
    for step in range(5):
        factor = 1 - 0.1 * step
        mine.set_rates(factor)
        for group, own in zip(plain.param_groups, options, strict=True):
            group["lr"] = own.get("lr", ARGUMENTS["lr"]) * factor
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn(left.shape, generator=torch.Generator().manual_seed(step))
            right.grad = left.grad.clone()
        mine.step()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        plain.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


class SignDescent(Optimizer):
    """The least that an optimizer can be."""

    laid_out = counters = ()

    def apply(self, gradients):
        for master, gradient in zip(self.param_groups[0]["params"], gradients, strict=True):
            master.data -= 0.1 * gradient.float().sign()


def test_weights_follow_an_optimizer_that_knows_only_masters(monkeypatch):
    def descent(masters, *others, **named):
        return SignDescent([{"name": "weights", "params": masters}], 0.0, None, defaults={"lr": 1.0})

    monkeypatch.setattr(weights_partition, "create_optimizer", descent)
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    partition = flat.FlatPartition(layer, config(mixed_precision="bf16"), Processes())
    partition.begin(1, 1.0)
    partition.receive([torch.ones_like(parameter) for parameter in partition.parameters], first=True)
    partition.update(last=True)
    torch.testing.assert_close(layer.weight.cpu(), (before - 0.1).bfloat16())


def test_state_that_no_one_declared_is_not_kept_by_a_guess():
    weights = parameters()
    optimizer = adamw(weights, 1.0)
    assert optimizer.state_of(weights[0]).keys() == {*optimizer.laid_out, *optimizer.counters}
    optimizer.state[weights[0]]["row_means"] = torch.zeros(3)
    with pytest.raises(TypeError, match="AdamW does not say how to keep row_means"):
        optimizer.state_of(weights[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    weights = parameters()
    averages = [weight.detach().clone() + 1 for weight in weights]
    optimizer = adamw(weights, 1.0, averages=averages)
    optimizer.set_average_weight(0.5)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    weights[0].grad[0] = value
    optimizer.step()
    for weight, old, average in zip(weights, before, averages, strict=True):
        assert torch.equal(weight, old)
        assert torch.equal(average, old + 1)
        assert torch.count_nonzero(optimizer.state[weight]["exp_avg"]) == 0
        assert float(optimizer.state[weight]["step"]) == 0


def test_the_averages_and_the_training_weights_are_written_in_the_same_step():
    weights = parameters()
    plain = Ema(weights, offload=False)
    averages, training = [w.detach().clone() for w in weights], [w.detach().bfloat16() for w in weights]
    optimizer = adamw(weights, 1.0, weights=training, averages=averages)
    for step in range(1, 6):
        optimizer.set_average_weight(1 - decay_of_step(step))
        optimizer.apply([torch.full_like(weight, step) for weight in weights])
        plain.update(step)
    for weight, average, expected, low in zip(weights, averages, plain.averages, training, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(low, weight.detach().bfloat16())


def test_parts_of_the_norm_are_added():
    weights = parameters()[:1]
    optimizer = adamw(weights, 1.0, lambda square: square + 16.0)
    weights[0].grad = torch.zeros_like(weights[0])
    weights[0].grad[0] = 3.0
    optimizer.step()
    assert optimizer.norm_and_skips().tolist() == [5.0, 0.0]


def config(**options) -> TrainConfig:
    return TrainConfig(family="sd", pretrained_model_name_or_path="unused", learning_rate=1e-3, **options)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_learning_rates_are_those_of_diffusers_schedules(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40, num_cycles=3, power=2.0)
    factor_of = rate_factors(config(lr_scheduler=name, lr_warmup_steps=5, lr_num_cycles=3, lr_power=2.0), 1e-3, 40)
    for step in range(40):
        assert 1e-3 * factor_of(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        schedule.step()


def test_scale_lr_multiplies_by_the_global_batch():
    scaled = config(scale_lr=True, gradient_accumulation_steps=3, train_batch_size=4)
    assert peak_rate(scaled, world=2) == pytest.approx(24e-3)


def test_8bit_adam_clips_by_the_global_norm():
    pytest.importorskip("bitsandbytes")
    ours = [torch.randn(5000, generator=torch.Generator().manual_seed(0)).requires_grad_()]
    before = ours[0].detach().clone()
    optimizer = create_optimizer(ours, WEIGHTS, config(use_8bit_adam=True, adam_weight_decay=0.0), None)
    optimizer.create_state(ours, torch.zeros_like)
    optimizer.set_rates(1.0)
    ours[0].grad = torch.full((5000,), 3.0)
    optimizer.step()
    assert float(optimizer.norm_and_skips()[0]) == pytest.approx(3 * 5000**0.5)
    torch.testing.assert_close(ours[0].grad, torch.full((5000,), 5000**-0.5))
    torch.testing.assert_close(ours[0].detach(), before - 1e-3, rtol=0, atol=2e-4)


def test_8bit_adam_skips_what_is_not_finite(monkeypatch):
    # The clipping around bitsandbytes' optimizer, with torch's in its place.
    stand_in = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    weights = [torch.ones(10).requires_grad_()]
    optimizer = create_optimizer(weights, WEIGHTS, config(use_8bit_adam=True, adam_weight_decay=0.0), None)
    Optimizer.create_state(optimizer, weights, torch.zeros_like)  # what lies beside the library's own
    weights[0].grad = torch.full((10,), float("nan"))
    optimizer.step()
    assert torch.equal(weights[0].detach(), torch.ones(10))
    assert optimizer.norm_and_skips()[1] == 1
    weights[0].grad = torch.full((10,), 3.0)
    optimizer.step()
    assert not torch.equal(weights[0].detach(), torch.ones(10))
    assert optimizer.norm_and_skips()[1] == 1


def test_decay_is_that_of_the_scripts():
    theirs = EMAModel([torch.zeros(1)])
    assert [decay_of_step(step) for step in (1, 2, 3, 10, 1000, 200_000)] == [
        theirs.get_decay(step) for step in (1, 2, 3, 10, 1000, 200_000)
    ]


def test_averages_follow_diffusers(model):
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    weights = list(unet.parameters())
    ours, theirs = Ema(weights, offload=False), EMAModel(weights)
    for step in range(1, 8):
        with torch.no_grad():
            torch._foreach_add_(weights, 0.01 * step)
        ours.update(step)
        theirs.step(weights)
    for left, right in zip(ours.averages, theirs.shadow_params, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offloaded_averages_are_those_kept_beside_the_weights(device):
    # Sizes below, at and beyond a slice, and one that is no multiple of it.
    weights = [torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device) for size in (5, 64, 1000, 1024)]
    plain, offloaded = Ema(weights, offload=False), Ema(weights, offload=True, slice_bytes=256)
    assert all(average.device.type == "cpu" for average in offloaded.averages)
    for step in range(1, 8):
        offloaded.wait()
        torch._foreach_mul_(weights, 1.01)
        torch._foreach_add_(weights, 0.01 * step)
        plain.update(step)
        offloaded.update(step)
    if device == "cuda":
        torch.cuda.synchronize()
    for left, right in zip(offloaded.averages, plain.averages, strict=True):
        assert torch.equal(left, right.cpu())
