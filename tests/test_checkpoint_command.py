"""python -m engine.checkpoint: what it says of a checkpoint, and the pipeline that it exports."""

import shutil
import tomllib

import pytest
import tomli_w
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from engine import checkpoint
from engine.config.command_line import to_toml
from engine.errors import UserError
from engine.loop.trainer import train
from engine.models import published
from engine.models.adapter import DOWN, UP, Adapter, adaptable, read_adapter, write_adapter
from tests.loop import test_families as families
from tests.loop.runs import config, flip_last_byte


@pytest.fixture(scope="module")
def trained(model, images, shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert train(config(model, images, shards, output, max_train_steps=4, checkpointing_steps=2, zero_stage=2)) == 0
    return output


def weights(directory):
    return load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["checkpoint", *map(str, arguments)])
    return checkpoint.main()


def test_info_describes_the_latest_of_an_output_directory(trained, monkeypatch, capsys):
    assert command(monkeypatch, "info", trained) == 0
    said = capsys.readouterr().out
    assert "checkpoint-4" in said
    assert "step           4" in said
    assert "seed           11" in said
    assert all(kind in said for kind in ("weight ", "ema ", "exp_avg ", "exp_avg_sq "))


def test_verify_names_what_is_damaged(trained, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "verify", trained / "checkpoint-2") == 0
    assert "is whole" in capsys.readouterr().out
    for step in (2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    flip_last_byte(tmp_path / "checkpoint-4" / "rank-0.safetensors")
    with pytest.raises(UserError, match=r"damaged: rank-0.safetensors .*resume from .*checkpoint-2 instead"):
        command(monkeypatch, "verify", tmp_path / "checkpoint-4")


def test_an_export_is_the_pipeline_that_training_left(trained, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "export", trained, "--output_dir", tmp_path / "ema") == 0
    assert "ema of step 4 in" in capsys.readouterr().out
    assert (tmp_path / "ema" / "model_index.json").is_file()
    ours, theirs = weights(tmp_path / "ema"), weights(trained)
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert command(monkeypatch, "export", trained / "checkpoint-2", "--output_dir", tmp_path / "raw", "--kind", "weight") == 0
    assert any(bool((value != theirs[name]).any()) for name, value in weights(tmp_path / "raw").items())


def test_an_adapter_is_exported_without_the_one_that_its_training_began_with(
    model, images, shards, tmp_path, monkeypatch, capsys
):
    pipeline = DiffusionPipeline.from_pretrained(model)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"unet.{layer}{DOWN}": torch.ones(2, 32), f"unet.{layer}{UP}": torch.zeros(32, 2)}
    start = tmp_path / "start.safetensors"
    write_adapter(start, Adapter(tensors, {f"unet.{layer}": 1.0}), "kohya")
    options = {"lora_rank": 2, "lora_weights": str(start), "save_format": "kohya", "checkpointing_steps": 1}
    assert train(config(model, images, shards, tmp_path / "style", max_train_steps=1, **options)) == 0
    start.unlink()
    assert command(monkeypatch, "export", tmp_path / "style", "--output_dir", tmp_path / "out") == 0
    exported, left = tmp_path / "out" / "out.safetensors", tmp_path / "style" / "style.safetensors"
    assert str(exported) in capsys.readouterr().out
    ours, theirs = (read_adapter(file, adaptable(pipeline)) for file in (exported, left))
    assert ours.alphas == theirs.alphas == {f"unet.{layer}": 1.0}
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in tensors)
    with safe_open(left, "pt") as opened:
        said = opened.metadata()
    assert (said["ss_sd_model_name"], said["ss_output_name"], said["ss_network_dim"]) == (model.name, "style", "2")


def test_an_export_needs_none_of_the_cards_that_the_training_needed(published, photographs, tmp_path, monkeypatch):
    options = {"mixed_precision": "bf16", "max_train_steps": 1, "checkpointing_steps": 1}
    run = families.config("kandinsky-prior", published("kandinsky-prior"), photographs, tmp_path / "out", **options)
    assert train(run) == 0
    fp8 = run.model_copy(update={"matrix_precision": "fp8", "compile": True, "train_batch_size": 16})
    (tmp_path / "out" / "config.toml").write_text(to_toml(fp8))
    assert command(monkeypatch, "export", tmp_path / "out", "--output_dir", tmp_path / "exported") == 0
    ours, theirs = (
        load_file(tmp_path / name / "prior" / "diffusion_pytorch_model.safetensors") for name in ("exported", "out")
    )
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["info", "nowhere"], "nowhere: neither a checkpoint nor"), (["frobnicate"], "unknown command 'frobnicate'")],
    ids=str,
)
def test_mistakes_are_named(arguments, named, monkeypatch):
    with pytest.raises(UserError, match=named):
        command(monkeypatch, *arguments)


@pytest.mark.parametrize(("said", "asked"), [
    ({"pretrained_model_name_or_path": "somebody/something"}, "--pretrained_model_name_or_path somebody/something"),
    ({"tokenizer_name": "somebody/words"}, "--tokenizer_name somebody/words"),
    ({"pretrained_model_name_or_path": "a/b", "revision": "refs/pr/1"}, "--revision refs/pr/1"),
    ({"cache_dir": "{tmp}/made"}, ""),
])  # fmt: skip
def test_a_configuration_beside_a_checkpoint_fetches_and_makes_nothing(said, asked, trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    values = tomllib.loads((trained / "config.toml").read_text()) | said
    lines = tomli_w.dumps(values).replace("{tmp}", str(tmp_path))
    (tmp_path / "config.toml").write_text(lines)
    monkeypatch.setattr(published, "download", lambda *_, **__: pytest.fail("fetched"))
    words = ["export", tmp_path, "--output_dir", tmp_path / "out"]
    if asked:
        with pytest.raises(UserError, match=f"config.toml: what is not on this machine .* add .*{asked}"):
            command(monkeypatch, *words)
    else:
        assert command(monkeypatch, *words) == 0
        assert not (tmp_path / "made").exists()


def test_models_of_an_export_are_named_on_the_command_line(trained, model, tmp_path, monkeypatch):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    values = tomllib.loads((trained / "config.toml").read_text()) | {"pretrained_model_name_or_path": "somebody/something"}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(values))
    words = ["export", tmp_path, "--output_dir", tmp_path / "out"]
    assert command(monkeypatch, *words, "--pretrained_model_name_or_path", model) == 0
    assert weights(tmp_path / "out").keys() == weights(trained).keys()
