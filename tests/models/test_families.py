"""The Kandinsky and Wuerstchen families: what they refuse, what they record, and what they leave to diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PriorTransformer
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from engine.config.options import CacheConfig, TrainConfig
from engine.data.format.index import Index
from engine.data.format.reader import Shards
from engine.data.samples.draw import draw_rows
from engine.errors import UserError
from engine.models.encoder import open_encoding
from engine.models.family import open_family
from engine.models.pipelines import combine, open_pipeline, use_portable_names
from engine.shards import build_command, info_command

RESOLUTION = {"kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}
FAMILIES = list(RESOLUTION)
PRIOR, DECODER = "pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"


def open_with(family: str, models: dict[str, str], **options):
    values = {"family": family, "resolution": RESOLUTION[family], **models, **options}
    return open_family(TrainConfig.model_validate(values))


def changed(models: dict[str, str], option: str, part: str, file: str, changes: dict, directory: Path) -> dict[str, str]:
    """The models with one value of one part's configuration changed."""
    copy = directory / "copy"
    shutil.copytree(models[option], copy)
    path = copy / part / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return models | {option: str(copy)}


@pytest.mark.parametrize(
    ("family", "option", "part", "changes", "named"),
    [
        ("kandinsky-prior", PRIOR, "prior", {"embedding_dim": 32}, "prior embedding_dim is 32, but image_encoder"),
        ("kandinsky-prior", PRIOR, "image_encoder", {"projection_dim": 32}, "image_encoder projection_dim is 32"),
        ("kandinsky-prior", PRIOR, "text_encoder", {"projection_dim": 32}, "text_encoder projection_dim is 32"),
        ("kandinsky-prior", PRIOR, "text_encoder", {"hidden_size": 32}, "text_encoder hidden_size is 32"),
        ("kandinsky-prior", PRIOR, "prior", {"num_embeddings": 77}, "num_embeddings is 77, but tokenizer"),
        ("kandinsky-prior", PRIOR, "text_encoder", {"max_position_embeddings": 8}, "the text encoder has 8 positions"),
        ("kandinsky-decoder", DECODER, "unet", {"in_channels": 9}, "unet in_channels is 9, but its latents have 4 channels"),
        ("kandinsky-decoder", DECODER, "unet", {"encoder_hid_dim": 48}, "encoder_hid_dim is 48, but the prior"),
        ("kandinsky-decoder", PRIOR, "image_encoder", {"projection_dim": 32}, "image_encoder projection_dim is 32"),
        ("wuerstchen", PRIOR, "prior", {"c_cond": 32}, "prior c_cond is 32, but text_encoder hidden_size is 24"),
        ("wuerstchen", PRIOR, "text_encoder", {"max_position_embeddings": 8}, "the text encoder has 8 positions"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(family, option, part, changes, named, published, tmp_path):
    models = changed(published(family), option, part, "config.json", changes, tmp_path)
    with pytest.raises(UserError, match=named) as error:
        open_with(family, models)
    assert str(tmp_path / "copy") in str(error.value)


@pytest.mark.parametrize(
    ("family", "part", "changes", "named"),
    [
        ("kandinsky-prior", "unet", {"encoder_hid_dim": 48}, "embedding_dim is 24, but the decoder's encoder_hid_dim is 48"),
        ("wuerstchen", "decoder", {"effnet_embd": 12}, "c_in is 16, but the decoder's effnet_embd is 12"),
    ],
)
def test_a_decoder_of_another_prior_is_named_before_the_training(family, part, changes, named, published, tmp_path):
    models = changed(published(family), DECODER, part, "config.json", changes, tmp_path)
    with pytest.raises(UserError, match=named):
        open_with(family, models, validation_prompts=["a cat"])
    open_with(family, models)  # without validation images the decoder is not asked for


def test_an_image_encoder_of_other_width_is_named(published, tmp_path):
    models = changed(published("wuerstchen"), PRIOR, "prior", "config.json", {"c_in": 12}, tmp_path)
    with pytest.raises(UserError, match="the prior's c_in is 12, but the image encoder's channels is 16"):
        open_with("wuerstchen", models).encoding.encoder_identity()


@pytest.mark.parametrize(
    ("family", "resolution", "named"),
    [
        ("wuerstchen", 512 + 64, "--resolution 576: Wuerstchen draws images in steps of 128 px; the nearest is 512"),
        ("wuerstchen", 100, "the nearest is 128"),
        ("kandinsky-decoder", 34, "--resolution 34: the Kandinsky decoder draws images in steps of 4 px; the nearest is 32"),
    ],
)
def test_sizes_that_the_pipelines_do_not_draw_are_refused(family, resolution, named, published):
    with pytest.raises(UserError, match=named):
        open_with(family, published(family), resolution=resolution)


@pytest.mark.parametrize("family", ["kandinsky-prior", "wuerstchen"])
def test_the_other_half_is_needed_for_validation_images_only(family, published):
    models = published(family) | {DECODER: "nobody/nothing"}
    assert open_with(family, models).encoding.record_spec
    with pytest.raises(UserError, match=f"--{DECODER} nobody/nothing: neither a directory nor on the hub"):
        open_with(family, models, validation_prompts=["a cat"])


def test_the_decoder_needs_only_the_image_encoder_of_the_prior(published, tmp_path):
    models = published("kandinsky-decoder")
    bare = tmp_path / "bare"
    for part in ("image_encoder", "image_processor"):
        shutil.copytree(Path(models[PRIOR]) / part, bare / part)
    assert open_with("kandinsky-decoder", models | {PRIOR: str(bare)}).encoding.record_spec


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_records_have_the_shape_and_precision_that_the_spec_says(family, precision, published, photographs):
    from PIL import Image

    encoding = open_with(family, published(family), mixed_precision=precision).encoding
    (prepared,) = encoding.prepare(Image.open(sorted(photographs.glob("*.jpg"))[0]).convert("RGB"), 0)
    with encoding.encoder(torch.device("cpu")) as encoder:
        rows = encoder.encode_images({name: tensor[None] for name, tensor in prepared.items()})
        if encoding.captioned:
            rows |= encoder.encode_captions(["a cat"])
    assert rows.keys() == encoding.record_spec.keys()
    for name, field in encoding.record_spec.items():
        assert rows[name].shape[1:] == field.shape
        assert rows[name].dtype == field.dtype
        assert rows[name].float().isfinite().all()
    assert not vars(encoder), "the frozen models must be let go"


def test_captions_are_encoded_with_the_mask_that_each_family_uses(published):
    captions = ["a cat", "an astronaut"]
    for family, model_class in (("kandinsky-prior", CLIPTextModelWithProjection), ("wuerstchen", CLIPTextModel)):
        models = published(family)
        with open_with(family, models).encoding.encoder(torch.device("cpu")) as encoder:
            rows = encoder.encode_captions(captions)
        tokenizer = CLIPTokenizer.from_pretrained(models[PRIOR], subfolder="tokenizer")
        tokens = tokenizer(captions, max_length=16, padding="max_length", truncation=True, return_tensors="pt")
        reference = model_class.from_pretrained(models[PRIOR], subfolder="text_encoder").eval()
        with torch.no_grad():
            masked = reference(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            plain = reference(tokens.input_ids).last_hidden_state
        assert not torch.allclose(masked, plain)
        assert torch.equal(rows["encoder_hidden_states"], masked if family == "wuerstchen" else plain)
        if family == "kandinsky-prior":
            assert torch.equal(rows["attention_mask"], tokens.attention_mask.bool())


def test_statistics_of_the_prior_are_read_from_any_of_its_files(published, tmp_path):
    models = published("kandinsky-prior")
    expected = load_file(Path(models[PRIOR]) / "prior" / "diffusion_pytorch_model.safetensors")
    copy = tmp_path / "copy"
    shutil.copytree(models[PRIOR], copy)
    shutil.rmtree(copy / "prior")
    PriorTransformer.from_pretrained(models[PRIOR], subfolder="prior").save_pretrained(copy / "prior", safe_serialization=False)
    assert not list((copy / "prior").glob("*.safetensors"))
    for path in (models[PRIOR], str(copy)):
        found = open_with("kandinsky-prior", models | {PRIOR: path}).encoding.clip_statistics()
        assert torch.equal(found["clip_mean"], expected["clip_mean"])
        assert torch.equal(found["clip_std"], expected["clip_std"])


def test_timesteps_of_wuerstchen_keep_fp32_under_bf16(published):
    opened = open_with("wuerstchen", published("wuerstchen"), mixed_precision="bf16")
    model = opened.load_model().to(torch.bfloat16)
    seen = []
    model.blocks[1].mapper.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    timesteps = torch.tensor([0.70001, 0.70002])
    record = {"encoder_hidden_states": torch.randn(2, 16, 24, dtype=torch.bfloat16)}
    prediction = opened.predict(model, torch.randn(2, 16, 4, 4, dtype=torch.bfloat16), timesteps, record)
    assert prediction.dtype == torch.bfloat16
    assert seen[0].dtype == torch.bfloat16
    assert not torch.equal(seen[0][0], seen[0][1]), "bf16 timesteps would be one and the same"
    angle = (
        timesteps.double()[:, None] * 10000 * torch.exp(-torch.arange(8).double() * torch.log(torch.tensor(1e4)).double() / 7)
    )
    torch.testing.assert_close(seen[0].double(), torch.cat([angle.sin(), angle.cos()], 1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_built_described_and_drawn(family, published, photographs, tmp_path, capsys):
    models = [f"--{name}={value}" for name, value in published(family).items()]
    arguments = ["--family", family, *models,
                 "--train_data_dir", str(photographs), "--resolution", str(RESOLUTION[family]), "--max_train_samples", "6",
                 "--shards_dir", str(tmp_path / "shards"), "--dataloader_num_workers", "2"]  # fmt: skip
    assert build_command(arguments) == 0
    index = Index.read(tmp_path / "shards")
    assert index.records == 6
    assert index.total("caption_rows") == (0 if family == "kandinsky-decoder" else 6)
    rows = draw_rows(Shards(tmp_path / "shards"), 1, torch.arange(12), torch.arange(12) % 6)
    assert ("caption" in rows) == (family != "kandinsky-decoder")
    assert info_command([str(tmp_path / "shards"), "--records", "2", *models]) == 0
    assert (tmp_path / "shards" / "contact-sheet.png").stat().st_size > 1000
    assert f"family         {family}" in capsys.readouterr().out
    # The same shards serve another run of the same family, whatever its decoder.
    config = CacheConfig.model_validate(index.config | ({} if family == "kandinsky-decoder" else {DECODER: "nobody/nothing"}))
    assert open_encoding(config).record_spec == index.fields


@pytest.mark.parametrize("name", ["kandinsky-prior", "wuerstchen"])
def test_halves_are_joined_in_either_order_and_others_refused(name, published):
    models = published(name)
    prior, decoder = (DiffusionPipeline.from_pretrained(models[option]) for option in (PRIOR, DECODER))
    for pipeline in (combine(prior, decoder), combine(decoder, prior)):
        assert type(pipeline).__name__.endswith("CombinedPipeline")
    with pytest.raises(UserError, match="are not the two halves of one pipeline"):
        combine(prior, prior)


def test_a_whole_pipeline_needs_no_other_half(model):
    assert type(open_pipeline(model, None, torch.float32)).__name__ == "StableDiffusionPipeline"
    with pytest.raises(UserError, match="has no other half"):
        open_pipeline(model, "x/y", torch.float32)


def test_a_saved_index_names_classes_that_every_release_knows(published, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(published("kandinsky-prior")[PRIOR])
    use_portable_names(pipeline)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["image_processor"] == ["transformers", "CLIPImageProcessor"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert DiffusionPipeline.from_pretrained(tmp_path).image_processor.size == pipeline.image_processor.size
