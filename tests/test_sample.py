"""Drawing from trained pipelines, compiled and not."""

import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from engine import sample
from engine.errors import UserError, exit_code
from engine.models import pipelines
from engine.models.pipelines import draw, open_pipeline
from tests.models.test_check import change, write_safety_checker

HALVES = {
    "sd": ("pretrained_model_name_or_path", None),
    "kandinsky-prior": ("pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"),
    "wuerstchen": ("pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"),
}
# Sampling steps, in tokens and pixels that the tiny models have.
ARGUMENTS = {
    "sd": {"height": 16, "width": 16, "num_inference_steps": 2},
    "kandinsky-prior": {"height": 32, "width": 32, "num_inference_steps": 2, "prior_num_inference_steps": 2},
    "wuerstchen": {"height": 128, "width": 128, "num_inference_steps": 2, "prior_num_inference_steps": 2},
}


@pytest.mark.parametrize("family", HALVES)
def test_every_sampling_step_calls_compiled_models(family, published, monkeypatch):
    options = published(family)
    ours, other = (options[name] if name else None for name in HALVES[family])
    calls = []

    def compile_module(module):
        def call(*arguments, **named):
            calls.append(type(module))
            return module._call_impl(*arguments, **named)

        module._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    pipeline = open_pipeline(ours, other, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = dict(draw(pipeline, ["a cat"], 2, 0, **ARGUMENTS[family]))
    assert not calls
    pipelines.compile_denoisers(pipeline)
    compiled = dict(draw(pipeline, ["a cat"], 2, 0, **ARGUMENTS[family]))
    denoisers = [part for part in pipelines.DENOISERS if part in pipeline.components]
    assert len(denoisers) == (1 if family == "sd" else 2)
    assert Counter(calls) == {type(pipeline.components[part]): 2 for part in denoisers}
    for before, after in zip(drawn["a cat"], compiled["a cat"], strict=True):
        assert np.array_equal(np.asarray(after), np.asarray(before))


def test_the_command_draws_a_grid_with_compiled_models(model, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    grid = tmp_path / "grid.png"
    arguments = ["--model", str(model), "--prompts", "a cat", "a dog", "--images_per_prompt", "2", "--num_inference_steps", "2",
                 "--resolution", "16", "--output", str(grid)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sample", *arguments])
    assert sample.main() == 0
    plain = np.asarray(Image.open(grid))
    assert not compiled
    monkeypatch.setattr(sys, "argv", ["sample", *arguments, "--compile"])
    assert sample.main() == 0
    assert [type(module).__name__ for module in compiled] == ["UNet2DConditionModel"]
    assert np.array_equal(np.asarray(Image.open(grid)), plain)


def test_samples_are_drawn_into_a_labelled_grid(model, tmp_path, monkeypatch):
    grid = tmp_path / "grid.png"
    arguments = ["--model", str(model), "--prompts", "a red square", "a very long prompt " * 20, "--output", str(grid)]
    monkeypatch.setattr(sys, "argv", ["sample", *arguments, "--num_inference_steps", "2", "--images_per_prompt", "2"])
    assert sample.main() == 0
    assert Image.open(grid).width > 2 * 64


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "no model_index.json there; give the output directory of a training that ended"),
        (["latest"], "no model_index.json there; make a pipeline of the checkpoint with `python -m engine.checkpoint export`"),
        (["manifest.json"], "no model_index.json there; make a pipeline of the checkpoint"),
        (None, "no such directory; give the output directory"),
    ],
    ids=str,
)
def test_a_model_that_is_none_is_named(entries, said, tmp_path, monkeypatch):
    for entry in entries or ():
        (tmp_path / entry).touch()
    model = tmp_path / "none" if entries is None else tmp_path
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(model), "--prompts", "x"])
    with pytest.raises(UserError, match=f"^--model {model}: {said}"):
        sample.main()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--resolution", "33"], "--resolution 33: this model draws images in steps of 8 px; the nearest is 32"),
        (["--num_inference_steps", "1001"], "--num_inference_steps 1001: this model has 1000 timesteps"),
        (["--num_inference_steps", "0"], "--num_inference_steps: must be at least 1, not 0"),
        (["--images_per_prompt", "-1"], "--images_per_prompt: must be at least 1 and at most 1024, not -1"),
        (["--images_per_prompt", "1000000"], "--images_per_prompt: must be at least 1 and at most 1024"),
        (["--images_per_prompt", "two"], "--images_per_prompt: invalid"),
        (["--guidance_scale", "nan"], "--guidance_scale: must be at least 0, not nan"),
        (["--guidance_scale", "inf"], "--guidance_scale: must be at least 0, not inf"),
        (["--seed", str(2**64)], "--seed: must be at least"),
        (["--prompts", "a\udcff"], "is not UTF-8"),
        (["--output", "samples.jpg"], "--output samples.jpg: pictures are written as PNG"),
        (["--output", "/proc/no/x.png"], "--output /proc/no: cannot be written"),
        (["--other_half", "x"], "has no other half; leave out --other_half"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused_in_one_line(arguments, named, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(model), "--prompts", "x", *arguments])
    assert exit_code("engine.sample", sample.main) == 2
    said = capsys.readouterr().err
    assert said.startswith("engine.sample: error: ")
    assert named in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("family", "wrong", "nearest"), [("wuerstchen", 100, 128), ("kandinsky-prior", 33, 32)])
def test_a_size_that_a_family_cannot_draw_is_not_drawn_as_another(family, wrong, nearest, published, monkeypatch):
    options = published(family)
    ours, other = (options[name] for name in HALVES[family])
    arguments = ["--model", ours, "--other_half", other, "--prompts", "x", "--resolution", str(wrong)]
    monkeypatch.setattr(sys, "argv", ["sample", *arguments])
    with pytest.raises(UserError, match=f"--resolution {wrong}: this model draws .* the nearest is {nearest}"):
        sample.main()


def test_a_pipeline_with_a_damaged_part_is_named(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(tmp_path / "model"), "--prompts", "x"])
    with pytest.raises(UserError, match="model.safetensors: truncated or damaged"):
        sample.main()


def test_a_size_that_nothing_is_trained_for_is_asked_for(model, tmp_path, monkeypatch):
    change(shutil.copytree(model, tmp_path / "model") / "unet" / "config.json", sample_size=2048)
    with pytest.raises(UserError, match=r"draws images of 4096 px; give --resolution"):
        draw_with(monkeypatch, tmp_path / "model", tmp_path)
    draw_with(monkeypatch, tmp_path / "model", tmp_path, "--resolution", "16")


def test_scales_and_sides_of_a_pipeline_are_bounded(published, model, tmp_path, monkeypatch):
    options = published("wuerstchen")
    for name, file, entry in (("prior", "pretrained_prior_model_name_or_path", "resolution_multiple"),
                              ("decoder", "pretrained_decoder_model_name_or_path", "latent_dim_scale")):  # fmt: skip
        change(shutil.copytree(options[file], tmp_path / name) / "model_index.json", **{entry: 1e-4})
        with pytest.raises(UserError, match=f"model_index.json: {entry} is 0.0001, far from"):
            draw_with(monkeypatch, tmp_path / name, tmp_path)
    write_safety_checker(shutil.copytree(model, tmp_path / "model"))
    change(tmp_path / "model" / "feature_extractor" / "preprocessor_config.json", do_pad=True, pad_size={"height": 16000})
    with pytest.raises(UserError, match=r"preprocessor_config.json: cannot be read: its height is 16000"):
        draw_with(monkeypatch, tmp_path / "model", tmp_path)
    options = published("kandinsky-prior")
    prior = shutil.copytree(options["pretrained_prior_model_name_or_path"], tmp_path / "kandinsky")
    change(prior / "prior" / "config.json", additional_embeddings=12000)
    with pytest.raises(UserError, match=r"its additional_embeddings is 12000, more than any model has"):
        draw_with(monkeypatch, prior, tmp_path)


def draw_with(monkeypatch, model, directory, *more) -> int:
    words = [
        "--model",
        model,
        "--prompts",
        "a",
        "--images_per_prompt",
        1,
        "--num_inference_steps",
        1,
        "--output",
        directory / "a.png",
    ]
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, words), *more])
    return sample.main()
