"""Drawing from trained pipelines, compiled and not."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from engine import sample
from engine.errors import UserError
from engine.models import pipelines
from engine.models.pipelines import draw, open_pipeline

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


def test_a_model_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(tmp_path), "--prompts", "x"])
    with pytest.raises(UserError, match="no model_index.json there"):
        sample.main()
