"""Training of adapters: against an independent loop of PEFT's and diffusers' parts, over processes, resumed and captured."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from engine import checkpoint
from engine.config.checks import check_options
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop import validation
from engine.loop.export import adapter_path
from engine.loop.trainer import train
from engine.models.adapter import read_adapter
from tests.commands import Command, run_two
from tests.loop import test_family_parity, test_parity
from tests.loop.adapters import trained_parameters
from tests.loop.runs import SLACK, checkpoint_tensors, command, config, relative_distance
from tests.loop.test_family_parity import FOLDER
from tests.loop.test_parity import SEED, STEPS

ALL = ["all-linear", "convolutions"]
PARITY = {
    "snr_gamma": 5.0, "gradient_accumulation_steps": 2, "train_batch_size": 4, "max_train_steps": STEPS,
    "checkpointing_steps": STEPS, "learning_rate": 1e-3, "adam_weight_decay": 0.02, "max_grad_norm": 0.02, "use_ema": True,
    "lora_rank": 4,
}  # fmt: skip


def adapters(checkpoint: Path, kind: str, part: str) -> dict[str, torch.Tensor]:
    """An adapter of a checkpoint by the names of PEFT's modules."""
    found = load_file(checkpoint / f"pytorch_lora_weights{kind}.safetensors")
    return {name.removeprefix(f"{part}.").removesuffix(".weight"): tensor for name, tensor in found.items()}


def by_module(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(".default", "").removesuffix(".weight"): tensor.detach() for name, tensor in parameters.items()}


def compare(checkpoint: Path, part: str, weights: dict, averages: dict, start: dict, note) -> None:
    for kind, expected in (("", weights), ("_ema", averages)):
        ours, theirs = adapters(checkpoint, kind, part), by_module(expected)
        assert ours.keys() == theirs.keys()
        distance = relative_distance(ours, theirs, by_module(start))
        note(kind, distance)
        print("DIST", kind, distance)
        assert distance < 1e-4 * SLACK


SD = [
    {},
    {"use_dora": True, "lora_alpha": 2.0},
    {"lora_targets": ALL, "lora_alpha": 8.0, "zero_stage": 2},
]


@pytest.mark.parametrize("case", SD, ids=lambda case: "-".join(case) or "plain")
def test_adapters_of_stable_diffusion_follow_the_reference(case, model, images, shards, tmp_path, record_property):
    options = config(model, images, shards, tmp_path / "out", seed=SEED, prediction_type="epsilon", **PARITY | case)
    assert train(options) == 0
    start = trained_parameters(UNet2DConditionModel.from_pretrained(model, subfolder="unet"), options)
    weights, averages, losses, norms = test_parity.reference_run(model, shards, options)
    assert max(norms) > options.max_grad_norm, "clipping must be active"
    compare(tmp_path / "out" / f"checkpoint-{STEPS}", "unet", weights, averages, start, record_property)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-4 * SLACK)
    result = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    average = load_file(tmp_path / "out" / f"checkpoint-{STEPS}" / "pytorch_lora_weights_ema.safetensors")
    assert all(torch.equal(result[name], average[name]) for name in result)


FAMILIES = [
    ("kandinsky-prior", {"zero_stage": 3}),
    ("kandinsky-decoder", {}),
    ("wuerstchen", {"lora_targets": ALL}),
    ("wuerstchen", {"use_dora": True}),
]


@pytest.mark.parametrize(("family", "case"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_adapters_of_the_other_families_follow_the_reference(family, case, published, photographs, tmp_path, record_property):
    options = TrainConfig(
        family=family, **published(family, dropout=0.0), train_data_dir=str(photographs), output_dir=str(tmp_path / "out"),
        resolution=128 if family == "wuerstchen" else 32, seed=test_family_parity.SEED, report_to="none", log_every=1,
        shard_records=5, **PARITY | case,
    )  # fmt: skip
    assert train(options) == 0
    trained, averages, _ = test_family_parity.reference_run(options, photographs)
    weights = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
    part = FOLDER[family]
    base = options.pretrained_decoder_model_name_or_path if part == "unet" else options.pretrained_prior_model_name_or_path
    start = trained_parameters(type(trained).from_pretrained(base, subfolder=part), options)
    compare(tmp_path / "out" / f"checkpoint-{STEPS}", part, weights, averages, start, record_property)


STATE = ("weight", "exp_avg", "exp_avg_sq", "ema")


def same_state(ours: Path, theirs: Path) -> bool:
    pairs = [(checkpoint_tensors(ours, kind), checkpoint_tensors(theirs, kind)) for kind in STATE]
    return all(torch.equal(one[name], other[name]) for one, other in pairs for name in one | other)


@pytest.mark.two_processes
def test_two_processes_train_what_one_does(model, images, shards, tmp_path):
    options = {"lora_rank": 4, "max_train_steps": 4, "zero_stage": 2, "lora_targets": ["to_q", "to_v", "to_out.0"]}
    assert train(config(model, images, shards, tmp_path / "one", **options)) == 0
    run_two(command(config(model, images, shards, tmp_path / "two", train_batch_size=2, **options)))
    found = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two")]
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    start = trained_parameters(unet, config(model, images, shards, tmp_path, **options))
    start = {f"unet.{name.replace('.default', '')}": parameter for name, parameter in start.items()}
    assert relative_distance(*found, start) < 1e-4 * SLACK


def test_a_run_that_was_killed_goes_on_to_the_bit(model, images, shards, tmp_path):
    options = {"lora_rank": 4, "max_train_steps": 60, "checkpointing_steps": 10, "checkpoints_total_limit": 2}
    assert train(config(model, images, shards, tmp_path / "whole", **options)) == 0
    resumed = config(model, images, shards, tmp_path / "killed", resume_from_checkpoint="latest", **options)
    process = Command(command(resumed))
    while not (tmp_path / "killed" / "latest").exists():
        assert process.poll() is None, process.errors
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert train(resumed) == 0
    assert same_state(tmp_path / "killed" / "checkpoint-60", tmp_path / "whole" / "checkpoint-60")


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "base_precision": "nf4"}, 2),
        ({"use_dora": True, "lora_targets": ALL, "zero_stage": 1}, 1),
        ({"gradient_checkpointing": True, "validation_fraction": 0.3, "validation_steps": 4}, 3),
    ],
    ids=str,
)
def test_replayed_training_is_eager_training(options, graphs, recorded, model, images, tmp_path):
    for name, how in (("eager", "off"), ("captured", "on")):
        run = config(model, images, tmp_path / "shards", tmp_path / name, cuda_graphs=how, lora_rank=4, **options)
        assert train(run) == 0
    assert len(recorded) == graphs
    assert same_state(tmp_path / "captured" / "checkpoint-8", tmp_path / "eager" / "checkpoint-8")


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_training_starts_from_an_adapter_in_any_form(form, model, images, shards, tmp_path, capsys):
    run = {"lora_rank": 2, "max_train_steps": 2, "use_ema": False}
    first = config(
        model, images, shards, tmp_path / "first", save_format=form, lora_alpha=3.0, lora_targets=["to_q", "conv1"], **run
    )
    assert train(first) == 0
    path = adapter_path(first)
    assert path.exists()
    again = {"lora_weights": str(path), "learning_rate": 0.0, "save_format": form}
    assert train(config(model, images, shards, tmp_path / "again", **run | again)) == 0
    unet = {"unet": UNet2DConditionModel.from_pretrained(model, subfolder="unet")}
    before, after = (read_adapter(tmp_path / name, unet) for name in ("first", "again"))
    assert before.alphas == after.alphas
    assert set(before.alphas.values()) == {3.0}
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert "LoRA of rank 2, alpha 3, on" in capsys.readouterr().err
    for wrong, said in (({"lora_rank": 4}, "its rank is 2; give --lora_rank 2"), ({"use_dora": True}, "is no DoRA; leave out")):
        with pytest.raises(UserError, match=said):
            train(config(model, images, tmp_path / "new", tmp_path / "wrong", **run | again | wrong))
    assert not (tmp_path / "new").exists()  # known before anything is encoded


def test_what_began_with_an_adapter_goes_on_without_its_file(model, images, shards, tmp_path, monkeypatch, capsys):
    run = {"lora_rank": 2, "max_train_steps": 1, "use_ema": False}
    assert train(config(model, images, shards, tmp_path / "first", lora_alpha=3.0, lora_targets=["to_q", "to_k"], **run)) == 0
    path, out = tmp_path / "first" / "pytorch_lora_weights.safetensors", tmp_path / "out"
    assert train(config(model, images, shards, out, lora_weights=str(path), **run)) == 0
    path.unlink()
    before = (out / "config.toml").read_text()
    resumed = run | {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    for options, said in (
        ({"lora_alpha": 2.0}, "began with --lora_weights, which says --lora_alpha itself"),
        ({"lora_dropout": 0.1}, "was written without --lora_dropout; leave it out"),
        ({"lora_targets": ["to_q"]}, "was written with --lora_targets to_k to_q .*; give the same"),
        ({"lr_of": ["*.to_q.*=0.1"]}, "queries, keys and values lie otherwise there"),
    ):
        with pytest.raises(UserError, match=said):
            train(config(model, images, shards, out, **resumed | options))
    assert (out / "config.toml").read_text() == before
    assert train(config(model, images, shards, out, lora_weights=str(path), **resumed)) == 0
    assert train(config(model, images, shards, out, **resumed | {"max_train_steps": 3})) == 0
    assert capsys.readouterr().err.count("LoRA of rank 2, alpha 3, on 16 layers") == 4
    unet = {"unet": UNet2DConditionModel.from_pretrained(model, subfolder="unet")}
    assert set(read_adapter(out, unet).alphas.values()) == {3.0}
    monkeypatch.setattr(
        "sys.argv", ["engine.checkpoint", "export", str(out / "checkpoint-1"), "--output_dir", str(tmp_path / "exported")]
    )
    assert checkpoint.main() == 0
    assert set(read_adapter(tmp_path / "exported", unet).alphas.values()) == {3.0}
    with pytest.raises(UserError, match="was written without --lora_weights; leave it out"):
        train(config(model, images, shards, tmp_path / "first", lora_weights=str(out), **resumed))


def test_images_are_drawn_with_the_adapter_and_checkpoints_hold_it(model, images, shards, tmp_path, monkeypatch):
    drawn = []
    real = validation.load_into
    monkeypatch.setattr(validation, "load_into", lambda pipeline, adapter: drawn.append(adapter) or real(pipeline, adapter))
    run = {"lora_rank": 2, "max_train_steps": 2, "checkpointing_steps": 1, "validation_prompts": ["a red square"]}
    assert train(config(model, images, shards, tmp_path / "out", num_validation_images=1, **run)) == 0
    assert (tmp_path / "out" / "samples" / "step-2.png").is_file()
    result = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(tensor, drawn[-1].tensors[name]) for name, tensor in result.items())
    exported = tmp_path / "exported"
    monkeypatch.setattr(
        "sys.argv", ["engine.checkpoint", "export", str(tmp_path / "out" / "checkpoint-2"), "--output_dir", str(exported)]
    )
    assert checkpoint.main() == 0
    again = load_file(exported / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in result.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "--use_dora needs --lora_rank"),
        ({"lora_rank": 4, "zero_stage": 3, "use_dora": True}, "--use_dora with --zero_stage 3"),
        ({"lora_rank": 4, "base_precision": "int8"}, "--base_precision int8 needs --mixed_precision bf16 or fp16"),
        (
            {"lora_rank": 4, "base_precision": "nf4", "mixed_precision": "bf16", "zero_stage": 3},
            "--base_precision nf4 with --zero_stage 3",
        ),
        ({"lora_rank": 4, "lora_weights": "a", "lora_alpha": 1.0}, "--lora_alpha with --lora_weights, which says it itself"),
    ],
    ids=str,
)
def test_options_that_contradict_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        check_options(config(Path("model"), Path("images"), Path("shards"), Path("out"), **options))


def test_another_rank_than_the_checkpoints_is_refused(model, images, shards, tmp_path):
    run = {"lora_rank": 2, "max_train_steps": 1}
    assert train(config(model, images, shards, tmp_path / "out", **run)) == 0
    with pytest.raises(UserError, match="was written with --lora_rank 2; give the same"):
        train(config(model, images, shards, tmp_path / "out", resume_from_checkpoint="latest", max_train_steps=2, lora_rank=4))
