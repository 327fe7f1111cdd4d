"""Groups of weights by pattern and by layer, on whatever partition, and what is frozen."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint
from engine.config.checks import check_options
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.checkpoints.names import rank_file
from engine.loop.checkpoints.snapshot import other_state
from engine.loop.optimizers import create_optimizer
from engine.loop.optimizers.groups import Group, groups_of
from engine.loop.trainer import train
from engine.models.family import open_family
from engine.models.trained_weights import check_rates
from tests.loop.runs import checkpoint_tensors, config, relative_distance

RATES = ["down_blocks.0=0", "*.to_q.*=3e-4", "unet.mid_block=2e-3"]


def options(**values) -> TrainConfig:
    return config("model", "images", "shards", "out", **values)


UNET = ["conv_in.weight", "time_embedding.linear_1.bias", "down_blocks.0.resnets.0.conv1.weight", "down_blocks.1.x.weight",
        "up_blocks.0.x.weight", "mid_block.attentions.0.x.weight", "conv_out.weight"]  # fmt: skip


def test_without_options_there_is_one_group():
    (group,) = set(groups_of(UNET, options(), 1).values())
    assert (group.name, group.rate) == ("weights", 1e-3)


def test_rates_decay_from_the_output_to_the_input():
    groups = groups_of(UNET, options(layer_lr_decay=0.5), 1)
    assert {group.name: group.rate / 1e-3 for group in groups.values()} == pytest.approx(
        {
            "output": 1,
            "up_blocks.0": 1 / 2,
            "mid_block": 1 / 4,
            "down_blocks.1": 1 / 8,
            "down_blocks.0": 1 / 16,
            "input": 1 / 32,
        }
    )
    assert next(iter(groups.values())).name == "input", "whatever the rates are"
    names = ["text_encoder.embeddings.token_embedding.weight", "text_encoder.encoder.layers.0.x.weight",
             "text_encoder.final_layer_norm.bias"]  # fmt: skip
    both = groups_of([*names, *(f"unet.{name}" for name in UNET)], options(layer_lr_decay=0.5), 1)
    assert both["text_encoder.embeddings.token_embedding.weight"].rate == 1e-3 / 4
    assert both["unet.conv_in.weight"].rate == 1e-3 / 32
    assert both["text_encoder.encoder.layers.0.x.weight"].name == "text_encoder.layers.0"
    prior = groups_of(["projection.weight", *(f"blocks.{number}.x" for number in range(6)), "out.1.weight"],
                      options(layer_lr_decay=0.5), 1)  # fmt: skip
    assert [group.rate / 1e-3 for group in dict.fromkeys(prior.values())] == [1 / 8, 1 / 4, 1 / 2, 1]
    among = groups_of([f"blocks.{number}.x" for number in range(6)], options(layer_lr_decay=0.5, lr_of=["blocks.1=1"]), 1)
    assert len({group.name for group in among.values()}) == len(set(among.values())) == 3, "blocks.1 is a layer's name, too"


def test_the_first_pattern_counts_and_scales_with_the_run():
    groups = groups_of(UNET, options(lr_of=["down_blocks.0=2", "down_*=3"], scale_lr=True, train_batch_size=4), 1)
    rates = [groups[name].rate for name in UNET]
    assert rates == pytest.approx([4e-3, 4e-3, 8, 12, 4e-3, 4e-3, 4e-3])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr_of": ["down_blocks"]}, "--lr_of down_blocks: give PATTERN=RATE"),
        ({"lr_of": ["down_blocks=-1"]}, "--lr_of down_blocks=-1: give PATTERN=RATE"),
        ({"freeze": [""]}, "--freeze: a pattern is empty"),
        ({"freeze": ["mid_block"], "lora_rank": 2}, "--freeze with --lora_rank: adapters alone are trained"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        check_options(options(**values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"freeze": ["down_block.*"]},
            "--freeze down_block.*: no weight of the model has such a name; they are named as conv_in",
        ),
        ({"lr_of": ["*.to_w=1"]}, r"--lr_of \*.to_w: no weight"),
        ({"freeze": ["unet"]}, "--freeze leaves no weight to train"),
    ],
)
def test_patterns_of_no_weight_or_of_all_are_refused_before_anything_is_encoded(values, said, model, images, tmp_path):
    with pytest.raises(UserError, match=said):
        train(config(model, images, tmp_path / "shards", tmp_path / "out", **values))
    assert not (tmp_path / "shards").exists()


def test_a_file_may_hold_a_table_of_rates():
    assert options(lr_of={"mid_block": 1e-5}).rates_of_patterns == [("mid_block", 1e-5)]
    assert options(freeze="mid_block").freeze == ["mid_block"]


@pytest.fixture(scope="module")
def grouped(model, images, shards, tmp_path_factory):
    """A run of three rates and the moving average."""
    output = tmp_path_factory.mktemp("runs") / "grouped"
    values = {"lr_of": RATES, "freeze": ["conv_out"], "adam_weight_decay": 0.0, "checkpointing_steps": 4}
    assert train(config(model, images, shards, output, **values)) == 0
    return output, values


def start(model, images, shards, output) -> dict[str, torch.Tensor]:
    family = open_family(config(model, images, shards, output, lr_of=RATES))
    return {name: parameter.detach().flatten() for name, parameter in family.load_model().named_parameters()}


def test_groups_learn_at_their_rates_and_frozen_weights_not_at_all(grouped, model, images, shards, tmp_path):
    output, _ = grouped
    before, after = start(model, images, shards, tmp_path), checkpoint_tensors(output / "checkpoint-8", "weight")
    assert before.keys() - after.keys() == {"conv_out.weight", "conv_out.bias"}
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after}
    # Each of eight steps moves a weight by its rate at most, and nearly that where the gradient keeps its sign.
    assert not any(distance for name, distance in moved.items() if name.startswith("down_blocks.0."))
    queries = [distance for name, distance in moved.items() if ".to_q." in name and not name.startswith("down_blocks.0.")]
    assert queries
    assert 1e-3 < max(queries) < 8.01 * 3e-4
    assert 8e-3 < max(distance for name, distance in moved.items() if name.startswith("mid_block.resnets")) < 8.01 * 2e-3
    assert 4e-3 < moved["up_blocks.0.resnets.0.conv1.weight"] < 8.01 * 1e-3
    # Queries learn otherwise, so that they are not stacked with keys and values.
    assert not any("to_qkv" in name for name in after)
    exported = torch.nn.Module.state_dict(open_family(config(output, images, shards, tmp_path)).published_model())
    published = open_family(config(model, images, shards, tmp_path)).published_model().state_dict()
    assert torch.equal(exported["conv_out.weight"], published["conv_out.weight"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == 1e-3


def test_the_two_matrices_of_an_adapter_may_learn_apart(model, images, shards, tmp_path):
    values = {"lora_rank": 2, "lora_targets": ["to_q", "to_k", "to_v"], "lr_of": ["*.lora_B*=4e-3", "*.attn2.to_q=5e-3"]}
    adapted = config(model, images, shards, tmp_path, **values)
    trained = [name for name, parameter in open_family(adapted).load_model().named_parameters() if parameter.requires_grad]
    rates = {name: group.rate for name, group in groups_of(trained, adapted, 1).items()}
    assert any(name.endswith("attn1.to_qkv.lora_B") for name in trained), "stacked all the same"
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {4e-3}
    assert {rate for name, rate in rates.items() if name.endswith("attn2.to_q.lora_A")} == {5e-3}
    assert {rate for name, rate in rates.items() if "attn1" in name and "lora_A" in name} == {1e-3}
    check_rates(trained, adapted)
    with pytest.raises(
        UserError, match="--lr_of mid_block.resnets: no weight of that name is trained; those that are have names"
    ):
        check_rates(trained, adapted.model_copy(update={"lr_of": ["mid_block.attentions=0", "mid_block.resnets=0"]}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_of_groups_goes_on_at_any_stage(grouped, stage, model, images, shards, tmp_path):
    output, values = grouped
    run = config(
        model, images, shards, tmp_path / "out", **values, zero_stage=stage, resume_from_checkpoint=str(output / "checkpoint-4")
    )
    assert train(run) == 0
    before = checkpoint_tensors(output / "checkpoint-4", "weight")
    for kind in ("weight", "exp_avg_sq", "ema"):
        ours, theirs = (checkpoint_tensors(each / "checkpoint-8", kind) for each in (tmp_path / "out", output))
        assert relative_distance(ours, theirs, before) < (1e-5 if kind == "weight" else 1e-3), kind


def test_a_run_of_groups_goes_on_to_the_bit(grouped, model, images, shards, tmp_path):
    output, values = grouped
    resumed = {"resume_from_checkpoint": str(output / "checkpoint-4")}
    assert train(config(model, images, shards, tmp_path / "out", **values, **resumed)) == 0
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        ours, theirs = (checkpoint_tensors(each / "checkpoint-8", kind) for each in (tmp_path / "out", output))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind


def test_every_process_keeps_the_names_of_all_groups():
    pytest.importorskip("bitsandbytes")
    groups, stored = [Group("of a", 1e-5), Group("weights", 1e-3)], []
    for held in (groups, groups[1:]):
        weights = [torch.ones(8192) for _ in held]
        optimizer = create_optimizer(weights, held, options(optimizer="adamw8bit"), None, (), groups)
        optimizer.create_state(weights, torch.zeros_like)
        partition: Any = SimpleNamespace(
            optimizer=optimizer, masters=weights, keys=["of a", "weights"], processes=SimpleNamespace(world=2)
        )
        stored.append({name: values[0].numel() for name, values in other_state(partition).items()})
    assert stored[0].keys() == stored[1].keys()
    assert [each["optimizer/of a/absmax1"] for each in stored] == [8192 // 256, 0]
    assert [each["optimizer/weights/absmax1"] for each in stored] == [8192 // 256] * 2


def test_numbers_are_of_all_groups_also_where_a_process_has_none():
    groups, weights = [Group("of a", 1e-5), Group("weights", 1e-3)], [torch.ones(4)]
    optimizer = create_optimizer(weights, groups[1:], options(optimizer="schedulefree_adamw"), None, (), groups)
    optimizer.create_state(weights, torch.zeros_like)
    optimizer.set_rates(1.0)
    optimizer.apply([torch.ones(4)])
    assert optimizer.state_of(weights[0])["weight_sum"].tolist() == pytest.approx([1e-10, 1e-6])


def test_state_goes_to_the_weights_that_it_is_of(model, images, shards, tmp_path):
    """Whatever the rates are; what is of a group that is no more is refused."""
    values = {"lr_of": ["down_blocks.0.resnets=1e-5", "conv_out=2e-5"], "use_ema": False, "max_train_steps": 1}
    for name in ("adafactor", "schedulefree_adamw"):
        assert train(config(model, images, shards, tmp_path / name, **values, optimizer=name)) == 0
    stored = load_file(tmp_path / "adafactor" / "checkpoint-1" / rank_file(0))
    assert stored["optimizer/conv_out.weight/row_var"].any()
    values |= {"resume_from_checkpoint": "latest", "max_train_steps": 2, "lr_of": ["conv_out=1e-5"]}
    assert train(config(model, images, shards, tmp_path / "adafactor", **values, optimizer="adafactor")) == 0
    given = "they were others there; give --lr_of down_blocks.0.resnets=1e-5 conv_out=2e-5$"
    with pytest.raises(UserError, match=given):
        train(config(model, images, shards, tmp_path / "schedulefree_adamw", **values, optimizer="schedulefree_adamw"))


def test_what_is_exported_of_a_checkpoint_is_what_the_run_left(grouped, tmp_path, monkeypatch):
    output, _ = grouped
    monkeypatch.setattr("sys.argv", ["checkpoint", "export", str(output), "--output_dir", str(tmp_path / "out")])
    assert checkpoint.main() == 0
    ours, theirs = (load_file(each / "unet" / "diffusion_pytorch_model.safetensors") for each in (tmp_path / "out", output))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
