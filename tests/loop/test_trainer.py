"""What a run leaves behind: metrics, validation images, the exported pipeline; and what it refuses."""

import json
import shutil
import sys
import tomllib

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config.command_line import load, read_toml
from engine.config.options import TrainConfig
from engine.data.format.index import SAMPLES, Index
from engine.errors import UserError
from engine.loop import curves, export, log, validation
from engine.loop.log import _forget_after
from engine.loop.trainer import train
from engine.tensors import read_header
from tests.loop.runs import config


@pytest.fixture(scope="module")
def trained(model, images, shards, tmp_path_factory):
    """Eight steps over twelve records (epochs end after steps 3, 6 and, within the run, no more)."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    prompts = ["a red square", "a blue square"]
    options = {"validation_prompts": prompts, "num_validation_images": 2, "prediction_type": "v_prediction"}
    run = config(
        model, images, shards, output, validation_epochs=2, report_to="tensorboard", log_every=3, hub_token="secret-token",
        gradient_checkpointing=True, **options,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "curves", curves.curves)
        assert train(run) == 0
    return output


def test_metrics_have_the_promised_keys(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line in lines:
        assert {"step", "epoch", "loss", "lr", "grad_norm", "samples_per_second", "step_seconds"} <= line.keys()
        assert line["epoch"] == pytest.approx(line["step"] * 4 / 12)
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(4)


def test_tensorboard_has_the_same_losses(trained):
    events = EventAccumulator(str(trained / "logs"))
    events.Reload()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == [line["step"] for line in lines]
    assert [event.value for event in scalars] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert [event.step for event in events.Images("validation")] == [3, 8]


def test_validation_images_are_drawn_after_the_due_epochs(trained):
    # Epochs end at steps 3 and 6; the first and every second one after it are due, and the end of training.
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step-3.png", "step-8.png"]
    grid = np.asarray(Image.open(trained / "samples" / "step-8.png"))
    assert grid.std() > 10


def test_the_configuration_is_stored_resolved_and_without_secrets(trained):
    text = (trained / "config.toml").read_text()
    assert "secret-token" not in text
    stored = tomllib.loads(text)
    assert stored["max_train_steps"] == 8
    assert stored["seed"] == 11


def test_diffusers_loads_the_result_and_draws(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red square", num_inference_steps=2).images[0]
    assert image.size == (16, 16)


def test_only_the_promised_entries_are_left(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.toml", "metrics.jsonl", "curves.png", "samples", "logs", "model_index.json", "scheduler", "text_encoder",
        "tokenizer", "unet", "vae", "checkpoint-8", "latest",
    }  # fmt: skip


def test_the_curves_are_drawn(trained):
    assert np.asarray(Image.open(trained / "curves.png").convert("L")).std() > 5


def test_one_process_trains_without_deepspeed(model, images, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it raises
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=2)) == 0
    with pytest.raises(ImportError):
        train(config(model, images, shards, tmp_path / "sharded", max_train_steps=2, zero_stage=1))


def test_validation_leaves_the_training_alone(model, images, shards, tmp_path):
    losses = []
    for name, options in (("drawn", {"validation_prompts": ["a red square"], "validation_epochs": 1}), ("plain", {})):
        assert train(config(model, images, shards, tmp_path / name, **options)) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(list((tmp_path / "drawn" / "samples").iterdir())) == 3
    assert losses[0] == losses[1]


def test_shards_may_lie_where_the_run_does(model, images, tmp_path, capsys):
    run = config(model, images, tmp_path, tmp_path, max_train_steps=1, validation_prompts=["a red square"])
    for steps in (1, 2):
        assert train(run.model_copy(update={"max_train_steps": steps, "resume_from_checkpoint": "latest"})) == 0
    assert (tmp_path / "samples" / "step-2.png").exists()
    assert (tmp_path / SAMPLES).is_file()


def fail(*arguments, **named):
    raise ZeroDivisionError("of a picture\nand more")


@pytest.mark.parametrize("place", ["labelled_grid", "draw", "save_png"])
def test_a_picture_that_fails_is_a_warning_and_costs_nothing(place, model, images, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation, place, fail)
    options = {"validation_prompts": ["a red square"], "validation_epochs": 1, "max_train_steps": 4}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        f"warning: validation images of step {step}: ZeroDivisionError: of a picture; the training goes on" for step in (3, 4)
    ]
    UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")


def test_curves_and_trackers_that_fail_are_warnings(model, images, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log, "curves", fail)
    monkeypatch.setattr(log.Log, "_picture", fail)
    options = {"validation_prompts": ["a red square"], "max_train_steps": 2}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    assert capsys.readouterr().err.count("warning: ") == 2


def test_checkpoint_and_pipeline_are_there_before_the_last_pictures(model, images, shards, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(validation, "draw", lambda *arguments, **named: seen.extend(path.name for path in out.iterdir()))
    out = tmp_path / "out"
    assert train(config(model, images, shards, out, validation_prompts=["a red square"], max_train_steps=2)) == 0
    assert {"checkpoint-2", "latest", "model_index.json", "unet"} <= set(seen)


def test_without_ema_the_weights_themselves_are_exported(model, images, shards, tmp_path):
    assert train(config(model, images, shards, tmp_path / "out", use_ema=False, max_train_steps=2, learning_rate=0.0)) == 0
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    theirs = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    # At learning rate 0 AdamW leaves the weights alone, decay included.
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)


def test_epochs_give_the_number_of_steps(model, images, shards, tmp_path):
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=None, num_train_epochs=2)) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6  # 2 epochs of 12 records in batches of 4


def test_shards_that_were_altered_are_named_as_early_as_asked(model, images, shards, tmp_path):
    directory = shutil.copytree(shards, tmp_path / "shards")
    run = config(model, images, directory, tmp_path / "out", max_train_steps=3, overwrite=True)
    file = directory / "shard-00001.safetensors"
    header, _, start = read_header(file)
    content = bytearray(file.read_bytes())
    first, end = header["latent_mean"]["data_offsets"]
    for row in range(start + first, start + end, 4 * 8 * 8 * 4):
        content[row] ^= 1
    file.write_bytes(content)
    everything = run.model_copy(update={"verify_shards": "all"})
    with pytest.raises(UserError, match=f"{file.name}: altered.*delete them and index.json, and they are built again"):
        train(everything)
    with pytest.raises(UserError, match="altered: .*; copy or build them again"):
        train(everything.model_copy(update={"train_data_dir": None}))
    named = rf"{file}: altered: row \d of latent_mean does not match its checksum \(record \d, sample \d of the data set\)"
    with pytest.raises(UserError, match=named):
        train(run)
    assert train(run.model_copy(update={"verify_shards": "none"})) == 0
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{file.name}: .* bytes instead of .*: truncated; delete them and index.json"):
        train(run)


def test_training_needs_only_the_shards(model, shards, tmp_path):
    run = config(model, shards, shards, tmp_path / "out", max_train_steps=1)
    run = run.model_copy(update={"train_data_dir": None})
    assert train(run) == 0


def test_shards_of_another_resolution_are_refused(model, shards, tmp_path):
    run = config(model, shards, shards, tmp_path / "out").model_copy(update={"train_data_dir": None, "resolution": 32})
    with pytest.raises(UserError, match=r"other records than this run reads \(--resolution 16, now 32\); give the options"):
        train(run)


def test_the_stored_configuration_draws_the_same_samples(model, images, tmp_path):
    first = TrainConfig(
        family="sd", pretrained_model_name_or_path=str(model), train_data_dir=str(images), output_dir=str(tmp_path / "first"),
        resolution=16, center_crop=True, max_train_samples=5, max_train_steps=1, train_batch_size=2, report_to="none",
    )  # fmt: skip
    assert train(first) == 0
    stored = read_toml(TrainConfig, tmp_path / "first" / "config.toml", "")
    assert train(load(TrainConfig, stored | {"output_dir": str(tmp_path / "second")})) == 0
    assert train(first.model_copy(update={"output_dir": str(tmp_path / "third")})) == 0
    one, two, three = (Index.read(tmp_path / name / "shards") for name in ("first", "second", "third"))
    assert one.fingerprint == two.fingerprint == three.fingerprint
    assert tomllib.loads((tmp_path / "second" / "config.toml").read_text())["seed"] == stored["seed"]
    weights = [(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_dream_needs_epsilon(model, images, shards, tmp_path):
    with pytest.raises(UserError, match="--dream_training needs prediction type epsilon, not sample"):
        train(config(model, images, shards, tmp_path / "out", dream_training=True, prediction_type="sample"))


def test_xformers_that_cannot_work_says_so(model, images, shards, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("xFormers may work here")
    with pytest.raises(UserError, match="--attention xformers: .*install the extra `xformers`"):
        train(config(model, images, shards, tmp_path / "out", enable_xformers_memory_efficient_attention=True))


def test_lines_of_steps_that_are_trained_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    _forget_after(path, 2, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_upload_leaves_checkpoints_and_shards_out(model, images, shards, tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, name, exist_ok):
            assert not (tmp_path / "out").exists(), "the repository is created before anything else"
            return type("Repository", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, **arguments):
            calls.update(arguments)

    monkeypatch.setattr(export, "HfApi", Api)
    options = {"push_to_hub": True, "hub_token": "t", "hub_model_id": "mine", "max_train_steps": 1}
    assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    assert calls["token"] == "t"
    assert calls["repo_id"] == "someone/mine"
    assert calls["folder_path"] == tmp_path / "out"
    (tmp_path / "out" / "attempt").touch()  # of the script for SLURM
    there = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    sent = set(filter_repo_objects([*there, ".lock", "failed"], ignore_patterns=calls["ignore_patterns"]))
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {path.split("/")[0] for path in sent} == {
        "model_index.json", "README.md", "config.toml", "metrics.jsonl", "curves.png", *parts
    }  # fmt: skip
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


def test_a_repository_that_cannot_be_created_stops_the_run_at_once(model, images, shards, tmp_path):
    with pytest.raises(UserError, match="--push_to_hub: cannot create out: .*hf auth login"):
        train(config(model, images, shards, tmp_path / "out", push_to_hub=True))
    assert not (tmp_path / "out").exists()


def test_the_exported_tokenizer_keeps_every_file_of_the_published_one(model, images, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(model, published)
    (published / "tokenizer" / "vocab.json").write_text('{"a</w>": 0}')
    (published / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert train(config(published, images, tmp_path / "shards", tmp_path / "out", max_train_steps=1)) == 0
    for file in (published / "tokenizer").iterdir():
        assert (tmp_path / "out" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
