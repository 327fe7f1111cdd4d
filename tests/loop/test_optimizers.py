"""Every optimizer that `--optimizer` names: against its own library, skipping, going on to the bit, and where it may run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.checks import check_options
from engine.config.optimizers import OPTIMIZERS
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.checkpoints.names import rank_file
from engine.loop.optimizers import create_optimizer
from engine.loop.optimizers.groups import Group
from engine.loop.report import advice
from engine.loop.trainer import train
from engine.loop.weights import check_division
from engine.loop.weights.ema import Ema
from tests.loop.runs import checkpoint_tensors, config, published_order

ALL = list(OPTIMIZERS)
OTHERS = [name for name in ALL if name not in ("adamw", "adamw8bit")]
SHAPES = {"down_blocks.0.x.weight": (6, 5), "down_blocks.0.x.bias": (6,), "mid_block.conv.weight": (4, 3, 3, 2)}


def options(**values) -> TrainConfig:
    return config("model", "images", "shards", "out", **values)


def masters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).flatten() for shape in SHAPES.values()]


def gradient(step: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 * step + like.numel()))


def created(weights, rates=(1e-2, 1e-2, 1e-2), **values):
    values = {"max_grad_norm": 0.5, "adam_weight_decay": 0.1, "learning_rate": 1e-2, "use_ema": False} | values
    groups = [Group(str(number), rate) for number, rate in enumerate(rates)]
    optimizer = create_optimizer(weights, groups, options(**values), None, list(SHAPES.items()))
    optimizer.create_state(weights, torch.zeros_like)
    return optimizer


def theirs(name: str, weights: list[torch.Tensor]):
    """The library's own over the same weights, in their shapes."""
    if name == "adafactor":
        return torch.optim.Adafactor(weights, lr=1e-2, weight_decay=0.1)
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(weights, lr=1e-2, weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True)
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(weights, lr=1e-2, weight_decay=0.1)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", ["adafactor", "prodigy", "schedulefree_adamw"])
def test_steps_are_those_of_the_library_after_clipping(name):
    ours, shaped = masters(), [w.clone().view(s) for w, s in zip(masters(), SHAPES.values(), strict=True)]
    if name == "adafactor":
        shaped = [shaped[0], shaped[1], shaped[2].view(4, -1)]  # a convolution is a matrix
    optimizer, plain = created(ours, optimizer=name), theirs(name, shaped)
    for step in range(5):
        optimizer.set_rates(1.0)
        for weight, left in zip(shaped, ours, strict=True):
            weight.grad = gradient(step, left).view(weight.shape)
        optimizer.apply([gradient(step, left) for left in ours])
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in shaped])
        for weight in shaped:
            weight.grad *= min(1.0, 0.5 / (float(norm) + 1e-6))
        plain.step()
    for left, right in zip(ours, shaped, strict=True):
        torch.testing.assert_close(left, right.flatten(), rtol=1e-5, atol=1e-6)
    if name == "schedulefree_adamw":
        plain.eval()
        for left, right in zip(ours, shaped, strict=True):
            average = torch.empty_like(left)
            optimizer.write_average(left, average)
            torch.testing.assert_close(average, right.flatten(), rtol=1e-5, atol=1e-6)


def test_muon_steps_on_matrices_and_adamw_on_the_rest():
    ours, groups = masters(), ["0", "1", "2"]
    optimizer = created(ours, optimizer="muon", max_grad_norm=0.0)
    matrices = [ours[0].clone().view(6, 5), ours[2].clone().view(4, 18)]
    bias = ours[1].clone()
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([bias], lr=1e-2, weight_decay=0.1)
    for step in range(4):
        optimizer.set_rates(1.0)
        optimizer.apply([gradient(step, weight) for weight in ours])
        matrices[0].grad, matrices[1].grad = gradient(step, ours[0]).view(6, 5), gradient(step, ours[2]).view(4, 18)
        bias.grad = gradient(step, bias)
        muon.step()
        adamw.step()
    for left, right in zip(ours, [matrices[0], bias, matrices[1]], strict=True):
        torch.testing.assert_close(left, right.flatten(), rtol=1e-4, atol=1e-5)
    assert [group["name"] for group in optimizer.param_groups] == groups


def test_stacked_projections_are_as_many_matrices():
    from engine.loop.optimizers.by_parameter import matrices

    shapes = {
        "down_blocks.0.attn1.to_qkv.weight": (12, 4), "down_blocks.0.attn1.to_qkv.bias": (12,),
        "mid_block.conv1.weight": (8, 3, 3, 4),
        "mid_block.attn1.to_qkv.lora_A": (9, 16), "mid_block.attn1.to_qkv.lora_B": (3, 16, 3),
        "blocks.0.gamma": (1, 1, 1, 8), "mid_block.conv1.lora_magnitude_vector.default.weight": (1, 8, 1, 1),
    }  # fmt: skip
    seen = [matrices(name, shapes) for name in shapes]
    assert seen == [(3, 4, 4), (12,), (1, 8, 36), (3, 3, 16), (3, 16, 3), (8,), (8,)]


def test_adafactor_steps_as_far_whatever_the_gradients_are():
    steps = []
    for scale in (1.0, 1e-7):
        weights = masters()
        before = weights[0].clone()
        optimizer = created(weights, optimizer="adafactor", max_grad_norm=0.0, adam_weight_decay=0.0)
        optimizer.set_rates(1.0)
        optimizer.apply([scale * gradient(0, weight) for weight in weights])
        steps.append(weights[0] - before)
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_step_that_is_not_finite_changes_nothing(name):
    weights = masters()
    optimizer = created(weights, optimizer=name)
    before = [weight.clone() for weight in weights]
    gradients = [gradient(0, weight) for weight in weights]
    gradients[1][2] = float("nan")
    optimizer.set_rates(1.0)
    optimizer.apply(gradients)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert optimizer.norm_and_skips()[1] == 1
    optimizer.apply([gradient(1, weight) for weight in weights])
    assert not torch.equal(weights[0], before[0])
    optimizer.state_of(weights[0])  # all of it is declared


@pytest.mark.parametrize("name", ["adafactor", "muon", "lion", "prodigy"])
def test_groups_step_at_their_rates(name, capsys):
    weights = masters()
    before = [weight.clone() for weight in weights]
    optimizer = created(weights, (1e-2, 1e-2, 0.0), optimizer=name)
    optimizer.set_rates(1.0)
    optimizer.apply([gradient(0, weight) for weight in weights])
    assert [torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)] == [False, False, True]
    assert not capsys.readouterr().out


@pytest.fixture(scope="module")
def shards_in_bf16(tmp_path_factory):
    return tmp_path_factory.mktemp("bf16") / "shards"


@pytest.mark.parametrize(
    "values",
    [
        *({"optimizer": name} for name in OTHERS),
        {"masters": "none", "mixed_precision": "bf16"},
        {"optimizer": "lion", "masters": "none", "mixed_precision": "bf16", "lr_of": ["mid_block=1e-2"]},
    ],
    ids=str,
)
def test_a_run_goes_on_to_the_bit(values, model, images, shards, shards_in_bf16, tmp_path, capsys):
    values = {"use_ema": values.get("optimizer") != "schedulefree_adamw", "learning_rate": 1e-3} | values
    values |= {
        "checkpointing_steps": 2,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 2,
        "adam_weight_decay": 0.01,
    }
    shards = shards_in_bf16 if "mixed_precision" in values else shards
    assert train(config(model, images, shards, tmp_path / "whole", **values, max_train_steps=4)) == 0
    said = capsys.readouterr().err.count("at least ")
    assert said == (3 if values.get("optimizer") in ("adafactor", "muon") else 0), "of state that is more for some weights"
    begun = tmp_path / "resumed"
    begun.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", begun / "checkpoint-2")
    assert train(config(model, images, shards, begun, **values, max_train_steps=4, resume_from_checkpoint="checkpoint-2")) == 0
    stored = [(output / "checkpoint-4" / rank_file(0)).read_bytes() for output in (begun, tmp_path / "whole")]
    assert stored[0] == stored[1]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(loss < 10 for loss in losses)


def test_the_average_of_schedule_free_is_the_model(model, images, shards, tmp_path):
    values = {"optimizer": "schedulefree_adamw", "use_ema": False, "max_train_steps": 3, "validation_fraction": 0.2}
    assert train(config(model, images, shards, tmp_path / "out", **values)) == 0
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert not (checkpoint / "unet_ema").exists()
    published = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    exported = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet").state_dict()
    y, z, average = (published_order(published, checkpoint_tensors(checkpoint, kind)) for kind in ("weight", "z", "ema"))
    for name, weight in published.state_dict().items():
        assert torch.equal(weight, average[name])
        assert torch.equal(weight, exported[name])
        torch.testing.assert_close(average[name], torch.lerp(y[name], z[name], 1 - 1 / 0.9), rtol=1e-5, atol=1e-7)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_loss_ema" in line for line in lines)


def test_weights_without_masters_are_bf16_and_averaged_in_fp32(model, images, shards_in_bf16, tmp_path, monkeypatch):
    values = {"masters": "none", "mixed_precision": "bf16", "max_train_steps": 2, "validation_fraction": 0.2}
    waits: list[Ema] = []
    monkeypatch.setattr(Ema, "wait", lambda self: waits.append(self))
    assert train(config(model, images, shards_in_bf16, tmp_path / "out", **values)) == 0
    assert len(waits) > 2, "once in each step, and before the averages are read"
    checkpoint = tmp_path / "out" / "checkpoint-2"
    kinds = {kind: {t.dtype for t in checkpoint_tensors(checkpoint, kind).values()} for kind in ("weight", "exp_avg_sq", "ema")}
    assert kinds == {"weight": {torch.bfloat16}, "exp_avg_sq": {torch.bfloat16}, "ema": {torch.float32}}
    published = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    stored = published_order(published, checkpoint_tensors(checkpoint, "weight"))
    assert all(torch.equal(weight.bfloat16(), stored[name]) for name, weight in published.state_dict().items())
    with pytest.raises(UserError, match="checkpoint-2: was written with --masters none; give the same"):
        train(config(model, images, shards_in_bf16, tmp_path / "out", **(values | {"masters": "fp32"}),
                     resume_from_checkpoint="latest"))  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizer": "lion", "use_8bit_adam": True}, "--use_8bit_adam contradicts --optimizer lion"),
        ({"optimizer": "adamw8bit", "use_8bit_adam": False}, "--no-use_8bit_adam contradicts --optimizer adamw8bit"),
        (
            {"optimizer": "schedulefree_adamw"},
            "--use_ema with --optimizer schedulefree_adamw, which keeps",
        ),
        (
            {"optimizer": "schedulefree_adamw", "use_ema": False, "adam_beta1": 0.0},
            "--adam_beta1 0 with --optimizer schedulefree",
        ),
        ({"optimizer": "prodigy", "layer_lr_decay": 0.5}, "--optimizer prodigy finds one rate for all weights"),
        ({"optimizer": "muon", "masters": "none"}, "--masters none is for --optimizer adamw or lion, not muon"),
        ({"masters": "none"}, "--masters none needs --mixed_precision bf16"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        check_options(options(**values))


@pytest.mark.parametrize(
    ("values", "world", "said"),
    [
        ({"optimizer": "muon"}, 2, "--optimizer muon with 2 processes"),
        ({"optimizer": "adafactor", "zero_stage": 1}, 1, "--optimizer adafactor with --zero_stage 1"),
        ({"optimizer": "prodigy", "offload_optimizer": "cpu"}, 1, "--optimizer prodigy with --offload_optimizer"),
        ({"masters": "none", "mixed_precision": "bf16"}, 2, "--masters none with 2 processes"),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_refused_by_name(values, world, said):
    with pytest.raises(UserError, match=said):
        check_division(options(**values), world)
    check_division(options(**(values | {"zero_stage": 0, "offload_optimizer": "none"})), 1)


def test_defaults_are_those_that_an_optimizer_needs():
    def default(name: str, option: str):
        return getattr(TrainConfig(family="sd", pretrained_model_name_or_path="m", optimizer=name), option)

    assert [default(name, "learning_rate") for name in ("adamw", "prodigy", "adafactor")] == [1e-4, 1.0, 1e-2]
    assert [default(name, "adam_beta2") for name in ("adamw", "lion")] == [0.999, 0.99]
    assert options(optimizer="adamw8bit").use_8bit_adam
    assert options(use_8bit_adam=True).optimizer == "adamw8bit"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("AdamW", "adamw"), ("AdamW8bit", "adamw8bit"), ("Lion", "lion"), ("AdaFactor", "adafactor"), ("Prodigy", "prodigy"),
     ("AdamWScheduleFree", "schedulefree_adamw"), ("Muon", "muon")],
)  # fmt: skip
def test_the_names_of_other_trainers_are_known(given, meant):
    assert options(optimizer=given).optimizer == meant


@pytest.mark.parametrize(("name", "stage"), [("lion", 3), ("schedulefree_adamw", 1)])
def test_what_can_be_divided_runs_under_zero(name, stage, model, images, shards, tmp_path):
    values = {"optimizer": name, "use_ema": name == "lion", "max_train_steps": 3}
    for output, zero in (("flat", 0), ("zero", stage)):
        assert train(config(model, images, shards, tmp_path / output, **values, zero_stage=zero)) == 0
    ours, theirs = (checkpoint_tensors(tmp_path / output / "checkpoint-3", "weight") for output in ("zero", "flat"))
    for name_of, weight in theirs.items():
        close = torch.isclose(ours[name_of], weight, rtol=1e-4, atol=1e-6)
        assert close.float().mean() > 0.99, name_of  # the sign of a gradient near zero may differ


class Reads(TorchDispatchMode):
    """Counts what the host reads of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*arguments, **(named or {}))


def documented() -> dict[str, list[str]]:
    section = Path("docs/performance.md").read_text().split("\n## Optimizers")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows if not row[0].startswith("`--")}


def test_the_table_names_every_optimizer():
    assert list(documented()) == ALL


@pytest.mark.parametrize("name", ALL)
def test_the_table_says_what_an_optimizer_keeps_and_reads(name):
    known, (state, reads, captured, divided, _) = OPTIMIZERS[name], documented()[name]
    weights = [torch.randn(2048 * 256)]
    groups, pieces = [Group("weights", 1e-3)], [("mid_block.x.weight", (2048, 256))]
    optimizer = create_optimizer(weights, groups, options(optimizer=name, use_ema=False), None, pieces)
    optimizer.create_state(weights, torch.zeros_like)
    tensors = [value for value in optimizer.state_of(weights[0]).values() if torch.is_tensor(value)]
    kept = sum(tensor.nbytes for tensor in tensors) / weights[0].numel()
    assert kept == pytest.approx(known.state, abs=0.1)
    assert re.match(r"\d+", state)[0] == str(known.state)
    optimizer.set_rates(1.0)
    with Reads() as counted:
        optimizer.apply([torch.randn_like(weights[0])])
    expected = sum(known.reads) + (name == "adafactor")  # of the number of its step, which is on the host
    assert counted.count == expected
    once, each = known.reads
    assert reads.startswith("once" if once else "never")
    assert (f"and {each} times for every" in reads) == bool(each)
    assert captured == ("whole step" if known.on_device else "up to the gradients")
    assert divided.startswith("any stage" if known.anywhere else "refused")


def test_what_is_recommended_is_said():
    assert "1 is recommended" in advice(options(optimizer="prodigy", learning_rate=1e-4))[0]
    assert "no schedule that decays" in advice(options(optimizer="schedulefree_adamw", lr_scheduler="cosine"))[0]
    assert advice(options()) == []


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "lion", "masters": "none", "mixed_precision": "bf16", "layer_lr_decay": 0.8},
        {"optimizer": "muon", "freeze": ["conv_in"]},
    ],
    ids=str,
)
def test_replayed_training_is_eager_training(values, recorded, model, images, shards, shards_in_bf16, tmp_path):
    """Of Muon, whose step is taken from the host, what comes before it is replayed."""
    shards = shards_in_bf16 if "mixed_precision" in values else shards
    for name, how in (("eager", "off"), ("captured", "on")):
        run = config(model, images, shards, tmp_path / name, cuda_graphs=how, max_train_steps=6, **values)
        assert train(run) == 0
    assert len(recorded) == 1
    eager, replayed = (tmp_path / name / "checkpoint-6" / rank_file(0) for name in ("eager", "captured"))
    assert eager.read_bytes() == replayed.read_bytes()
