"""The Stable Diffusion family: what it refuses, and what it takes from the pretrained pipeline."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler, PNDMScheduler

from engine.config.options import CacheConfig, TrainConfig
from engine.errors import UserError
from engine.models import training_form
from engine.models.encoder import open_encoding
from engine.models.family import open_family
from engine.models.stable_diffusion import from_pure_noise
from tests import tiny


def config(model, **options) -> TrainConfig:
    values = {"family": "sd", "pretrained_model_name_or_path": str(model), "shards_dir": "unused", "resolution": 16}
    return TrainConfig(**(values | options))


def edited(model, directory, part: str, **changes):
    """A copy of the pipeline with changes to the configuration of one part."""
    shutil.copytree(model, directory)
    file = directory / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def test_the_record_follows_the_configurations(model):
    spec = open_encoding(config(model, mixed_precision="bf16")).record_spec
    assert spec["latent_mean"].shape == (4, 8, 8)
    assert spec["encoder_hidden_states"].shape == (16, 24)
    assert {field.dtype for field in spec.values()} == {torch.bfloat16}
    assert [field.per for field in spec.values()] == ["image", "image", "caption"]


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("unet", {"cross_attention_dim": 32}, "unet cross_attention_dim is 32, but text_encoder hidden_size is 24"),
        ("unet", {"in_channels": 9}, "unet in_channels is 9, but its latents have 4 channels; this is a model for inpainting"),
        ("text_encoder", {"hidden_size": 48}, "is 24, but text_encoder hidden_size is 48"),
    ],
)
def test_parts_of_different_pipelines_are_named(part, changes, named, model, tmp_path):
    with pytest.raises(UserError, match=named):
        open_family(config(edited(model, tmp_path / "model", part, **changes)))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
def test_a_missing_part_is_named(part, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(UserError, match=f"no {part} there; give a complete diffusers pipeline"):
        open_family(config(tmp_path / "model"))


def test_a_resolution_that_the_vae_cannot_take_names_the_nearest(model):
    with pytest.raises(UserError, match="--resolution 17: the VAE needs a multiple of 2; the nearest is 16"):
        open_family(config(model, resolution=17))


def test_a_model_that_is_nowhere_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody/nothing: neither a directory nor on the hub"):
        open_family(config("nobody/nothing"))


def test_weights_that_are_missing_are_named(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet: no weights there, the download is incomplete"):
        open_family(config(tmp_path / "model")).check_files()


def test_a_variant_serves_where_there_are_no_other_weights(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_family(config(tmp_path / "model", variant="fp16")).load_model().training


def test_the_prediction_type_comes_from_the_scheduler_unless_given(tmp_path):
    model = tiny.write_pipeline(tmp_path / "v", prediction_type="v_prediction")
    assert open_family(config(model)).prediction_type == "v_prediction"
    assert open_family(config(model, prediction_type="sample")).prediction_type == "sample"


def test_a_zero_terminal_snr_schedule_refuses_epsilon(tmp_path):
    model = tiny.write_pipeline(tmp_path / "zero", rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="zero terminal SNR"):
        open_family(config(model, snr_gamma=5.0))
    assert open_family(config(model, snr_gamma=5.0, prediction_type="v_prediction")).schedule.timesteps == 1000


def test_that_the_last_timestep_weighs_nothing_is_said_where_it_is_drawn(tmp_path, capsys):
    model = tiny.write_pipeline(tmp_path / "zero", rescale_betas_zero_snr=True)
    options = {"snr_gamma": 5.0, "prediction_type": "v_prediction"}
    for end, said in ((None, 1), (1000, 1), (999, 0)):
        open_family(config(model, max_timestep=end, **options))
        assert capsys.readouterr().err.count("The last timestep is pure noise") == said


@pytest.mark.parametrize(
    ("kind", "given"), [(PNDMScheduler, {}), (LMSDiscreteScheduler, {}), (HeunDiscreteScheduler, {}),
                        (HeunDiscreteScheduler, {"clip_sample": True, "beta_end": 0.015})]
)  # fmt: skip
def test_a_scheduler_in_place_of_one_that_cannot_start_from_pure_noise_keeps_its_values(kind, given):
    before = kind(**given)
    scheduler = from_pure_noise(before)
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.clip_sample is given.get("clip_sample", False), "latents have no bounds"
    shared = {"beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset", "set_alpha_to_one"}
    assert all(scheduler.config[name] == before.config[name] for name in shared & before.config.keys())
    assert float(scheduler.alphas_cumprod[-1]) == 0.0


def test_without_a_form_the_model_is_the_published_one(model):
    opened = open_family(config(model, gradient_checkpointing=True))
    published, ours = opened.load_model(form=None), opened.load_model()
    assert published.training
    assert not published.is_gradient_checkpointing
    assert not any(type(module).__module__ == training_form.__name__ for module in published.modules())
    assert any(type(module).__module__ == training_form.__name__ for module in ours.modules())


def test_encoders_have_the_precision_of_the_run(model):
    encoding = open_encoding(CacheConfig.model_validate(config(model, mixed_precision="bf16").model_dump(
        include=set(CacheConfig.model_fields))))  # fmt: skip
    with encoding.encoder(torch.device("cpu")) as encoder:
        rows = encoder.encode_captions(["a red square"]) | encoder.encode_images({"pixels": torch.zeros(2, 3, 16, 16)})
    for name, field in encoding.record_spec.items():
        assert rows[name].shape[1:] == field.shape
        assert rows[name].dtype == field.dtype
    assert not hasattr(encoder, "vae")
