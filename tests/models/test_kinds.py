"""Models of another kind are named as what they are, with what to do."""

import json
import shutil

import pytest

from engine.config.checks import check_machine
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.models.family import open_family

MODEL, PRIOR, DECODER = (f"pretrained_{name}model_name_or_path" for name in ("", "prior_", "decoder_"))
RESOLUTION = {"sd": 16, "kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}


def config(family, models, **options) -> TrainConfig:
    values = {"family": family, "resolution": RESOLUTION[family], "shards_dir": "unused"}
    return TrainConfig.model_validate(values | models | options)


def write_index(directory, pipeline_class, **parts):
    directory.mkdir(exist_ok=True)
    (directory / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class} | parts))
    return str(directory)


@pytest.mark.parametrize(
    ("family", "option", "pipeline_class", "named"),
    [
        ("sd", MODEL, "StableDiffusionXLPipeline", "this is Stable Diffusion XL"),
        ("sd", MODEL, "StableDiffusionXLImg2ImgPipeline", "this is Stable Diffusion XL"),
        ("sd", MODEL, "StableDiffusion3Pipeline", "this is Stable Diffusion 3"),
        ("sd", MODEL, "StableDiffusionInpaintPipeline", "this is Stable Diffusion for inpainting"),
        ("sd", MODEL, "StableDiffusionInstructPix2PixPipeline", "this is InstructPix2Pix"),
        ("sd", MODEL, "FluxPipeline", r"FLUX \(FluxPipeline\), not Stable Diffusion 1.x or 2.x; what can be trained: Stable"),
        ("sd", MODEL, "KandinskyV22Pipeline", f"a Kandinsky 2.2 decoder .*--{DECODER} takes it with --family kandinsky-"),
        ("kandinsky-prior", PRIOR, "KandinskyPriorPipeline", "this is a Kandinsky 2.1 prior"),
        ("kandinsky-prior", PRIOR, "KandinskyV22Pipeline", f"this is a Kandinsky 2.2 decoder .*--{DECODER} takes it$"),
        ("kandinsky-decoder", DECODER, "KandinskyPipeline", "this is a Kandinsky 2.1 decoder"),
        ("kandinsky-decoder", DECODER, "KandinskyV22ControlnetPipeline", "a Kandinsky 2.2 decoder with depth"),
        ("kandinsky-decoder", PRIOR, "StableDiffusionPipeline", f"--{MODEL} takes it with --family sd"),
        ("wuerstchen", PRIOR, "WuerstchenDecoderPipeline", f"this is a Wuerstchen decoder .*--{DECODER} takes it$"),
        ("wuerstchen", PRIOR, "StableCascadePriorPipeline", "this is Stable Cascade"),
    ],
)  # fmt: skip
def test_pipelines_of_another_class_are_named(family, option, pipeline_class, named, published, tmp_path):
    models = published(family) | {option: write_index(tmp_path / "other", pipeline_class)}
    with pytest.raises(UserError, match=named) as error:
        open_family(config(family, models))
    assert f"--{option} {tmp_path / 'other'}" in str(error.value)


def test_a_class_that_has_no_words_is_told_by_its_parts(model, tmp_path):
    shutil.copytree(model, tmp_path / "own")
    index = json.loads((model / "model_index.json").read_text())
    write_index(
        tmp_path / "own", "StableDiffusionImg2ImgPipeline", **{name: index[name] for name in index.keys() - {"_class_name"}}
    )
    assert open_family(config("sd", {MODEL: str(tmp_path / "own")})).load_model().training
    write_index(tmp_path / "own", "PixArtSigmaPipeline", text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(UserError, match="a PixArtSigmaPipeline whose text_encoder is a T5EncoderModel, not a CLIPTextModel"):
        open_family(config("sd", {MODEL: str(tmp_path / "own")}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_channels": 9}, "unet in_channels is 9, but its latents have 4 channels; this is a model for inpainting"),
        (
            {"in_channels": 8},
            r"this is a model for editing \(InstructPix2Pix\); what can be trained: Stable",
        ),
        ({"in_channels": 7}, "for upscaling"),
        ({"addition_embed_type": "text_time"}, "unet addition_embed_type is text_time: .*as Stable Diffusion XL does"),
        ({"class_embed_type": "projection"}, "as Stable unCLIP does"),
        ({"_class_name": "UNet2DModel"}, r"unet/config.json: of a UNet2DModel, not of a UNet2DConditionModel"),
    ],
)
def test_unets_for_something_else_are_named(changes, named, model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    file = tmp_path / "other" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=named):
        open_family(config("sd", {MODEL: str(tmp_path / "other")}))


def test_a_kandinsky_2_1_decoder_is_told_by_its_unet(published, tmp_path):
    models = published("kandinsky-decoder")
    shutil.copytree(models[DECODER], tmp_path / "other")
    file = tmp_path / "other" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder_hid_dim_type": "text_image_proj"}))
    with pytest.raises(UserError, match="unet encoder_hid_dim_type is text_image_proj: it takes conditions of another model"):
        open_family(config("kandinsky-decoder", models | {DECODER: str(tmp_path / "other")}))


def test_a_directory_that_is_no_pipeline_says_which_to_give(model, tmp_path):
    shutil.copytree(model, tmp_path / "cache" / "snapshots" / "4d7a")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for path, named in (
        (tmp_path / "cache", f"give {tmp_path / 'cache' / 'snapshots' / '4d7a'}"),
        (model / "unet", f"this is a part; give the pipeline, {model}"),
        (adapter, r"an adapter \(LoRA\)"),
    ):
        with pytest.raises(UserError, match=named):
            check_machine(config("sd", {MODEL: str(path)}))
