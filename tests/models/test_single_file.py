"""Single files of Stable Diffusion: written, recognised, opened without a network; and named where they are something else."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from engine import export
from engine.config.checks import check_machine
from engine.config.options import CacheConfig, TrainConfig
from engine.errors import UserError
from engine.loop.trainer import train
from engine.models.family import open_family
from engine.models.original_layout import _unet_tensors, write_single_file
from engine.models.published import digest_folder
from engine.models.single_file import CLIP, OPEN_CLIP, UNET, _unet_config, open_single_file
from examples.tiny_models import write_tokenizer

MODEL = "pretrained_model_name_or_path"


def write_pipeline(directory: Path, second: bool = False) -> Path:
    """A Stable Diffusion whose small models follow the rules of the published ones: 32 groups, heads, attention by level."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(directory / "spelling")
    tokenizer.pad_token = "!" if second else "<|endoftext|>"
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=16, hidden_act="gelu" if second else "quick_gelu", bos_token_id=0, eos_token_id=2,
        projection_dim=512 if second else 768,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=256, block_out_channels=(64, 128), layers_per_block=2, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2) if second else 8, use_linear_projection=second, upcast_attention=second,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4, sample_size=512, layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False}
    scheduler = (
        DDIMScheduler(**options, clip_sample=False, steps_offset=1, prediction_type="v_prediction")
        if second
        else PNDMScheduler(**options, skip_prk_steps=True, steps_offset=1)
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(directory / "pipeline")  # fmt: skip
    return directory / "pipeline"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[bool, Path]:
    return {second: write_pipeline(tmp_path_factory.mktemp("pipeline"), second) for second in (False, True)}


def configuration(file: Path, pipeline: Path, directory: Path, model=TrainConfig, **options):
    values = {"family": "sd", MODEL: str(file), "tokenizer_name": str(pipeline), "cache_dir": str(directory / "cache"),
              "resolution": 16, "shards_dir": "unused", "output_dir": str(directory / "out"), "report_to": "none"}  # fmt: skip
    return model.model_validate({name: value for name, value in (values | options).items() if name in model.model_fields})


def assert_same(left: Path, right: Path) -> None:
    """The same tensors, and the same picture."""
    for part in ("unet", "vae", "text_encoder"):
        (expected,), (found,) = ((pipeline / part).glob("*.safetensors") for pipeline in (left, right))
        expected, found = (
            {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()} for file in (expected, found)
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    pictures = [draw(pipeline) for pipeline in (left, right)]
    assert (pictures[0] == pictures[1]).all()


def draw(pipeline: Path):
    opened = DiffusionPipeline.from_pretrained(pipeline)
    opened.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return opened("a cat", num_inference_steps=2, height=32, width=32, generator=generator, output_type="np").images


def without_metadata(file: Path, copy: Path, **metadata: str) -> Path:
    save_file(load_file(file), copy, {"format": "pt"} | metadata)
    return copy


def test_the_engines_own_file_gives_the_same_tensors_and_picture(model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.safetensors"
    monkeypatch.setattr("sys.argv", ["export", "--model", str(model), "--single_file", str(file)])
    assert export.main() == 0
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-v1"
        assert f"{UNET}input_blocks.1.0.in_layers.0.weight" in opened.keys()  # noqa: SIM118
    folder = open_single_file(file, configuration(file, model, tmp_path))
    assert_same(model, folder)
    assert f"{file}: opened as Stable Diffusion 1.x, epsilon; its parts are in {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("second", [False, True])
def test_a_file_of_another_program_is_recognised(second, pipelines, tmp_path):
    pipeline = pipelines[second]
    write_single_file(pipeline, tmp_path / "own.safetensors")
    file = without_metadata(tmp_path / "own.safetensors", tmp_path / "model.safetensors")
    names = load_file(file).keys()
    assert (OPEN_CLIP + "transformer.resblocks.1.attn.in_proj_weight" in names) == second
    assert (CLIP + "encoder.layers.1.self_attn.q_proj.weight" in names) != second
    folder = open_single_file(file, configuration(file, pipeline, tmp_path, prediction_type="v_prediction"))
    assert_same(pipeline, folder)
    for part in ("unet", "vae", "text_encoder"):
        expected, found = (json.loads((path / part / "config.json").read_text()) for path in (pipeline, folder))
        changed = {name for name in found if found[name] != expected.get(name)} - {"_name_or_path", "sample_size"}
        assert changed <= {"num_attention_heads"}


def test_a_run_trains_a_single_file_and_its_result_goes_back_into_one(pipelines, images, tmp_path):
    write_single_file(pipelines[False], tmp_path / "own.safetensors", torch.float16)
    file = without_metadata(tmp_path / "own.safetensors", tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    config = configuration(file, pipelines[False], tmp_path, train_data_dir=str(images), shards_dir=None, max_train_steps=1)
    assert train(config) == 0
    write_single_file(Path(config.output_dir), tmp_path / "trained.safetensors")
    folder = open_single_file(tmp_path / "trained.safetensors", config)
    assert_same(Path(config.output_dir), folder)
    assert {tensor.dtype for part in ("unet", "vae", "text_encoder")
            for path in (open_single_file(file, config) / part).glob("*.safetensors")
            for tensor in load_file(path).values()} == {torch.float16}  # fmt: skip
    once = digest_folder(open_single_file(file, config) / "vae")
    other = config.model_copy(update={"cache_dir": str(tmp_path / "other")})
    assert digest_folder(open_single_file(file, other) / "vae") == once, "shards must be found again on another machine"


def test_checkpoints_of_lightning_and_old_names_are_opened(pipelines, tmp_path):
    write_single_file(pipelines[False], tmp_path / "own.safetensors")
    tensors = {name.replace("text_model.", ""): tensor for name, tensor in load_file(tmp_path / "own.safetensors").items()}
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "global_step": 7}, file)
    assert_same(pipelines[False], open_single_file(file, configuration(file, pipelines[False], tmp_path)))


class Callback:
    """What training programs leave in their checkpoints."""


def test_a_pickle_with_programs_is_not_run(tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "callbacks": Callback()}, file)
    with pytest.raises(UserError, match=f"{file}: holds programs beside tensors, and is not run; give it as .safetensors"):
        open_family(configuration(file, tmp_path, tmp_path))


def test_what_sd_2_predicts_is_read_or_asked_for(pipelines, tmp_path):
    pipeline = pipelines[True]
    write_single_file(pipeline, tmp_path / "own.safetensors")
    file = without_metadata(tmp_path / "own.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not say what it predicts; give --prediction_type v_prediction"):
        open_family(configuration(file, pipeline, tmp_path))
    assert open_family(configuration(file, pipeline, tmp_path, prediction_type="epsilon")).prediction_type == "epsilon"
    without_metadata(tmp_path / "own.safetensors", file, **{"modelspec.prediction_type": "v"})
    assert open_family(configuration(file, pipeline, tmp_path)).prediction_type == "v_prediction"
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, file)
    assert open_family(configuration(file, pipeline, tmp_path)).prediction_type == "v_prediction"
    assert open_single_file(tmp_path / "model.safetensors", configuration(file, pipeline, tmp_path, CacheConfig)).is_dir()


def scheduler_of(folder: Path) -> dict:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def test_a_schedule_rescaled_to_pure_noise_stays_with_the_pipeline_and_its_file(pipelines, images, tmp_path, capsys):
    pipeline = pipelines[False]
    run = {"train_data_dir": str(images), "shards_dir": str(tmp_path / "shards"), "train_batch_size": 2, "seed": 1,
           "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "snr_gamma": 5.0, "checkpointing_steps": 1,
           "tokenizer_name": None}  # fmt: skip
    assert train(configuration(pipeline, pipeline, tmp_path, max_train_steps=1, **run)) == 0
    said = capsys.readouterr().err
    assert "The last timestep is pure noise, which these loss weights give none; --min_loss_weight would give it one" in said
    assert "The pipeline samples with DDIMScheduler: PNDMScheduler has no schedule that ends in pure noise" in said
    more = configuration(pipeline, pipeline, tmp_path, max_train_steps=2, resume_from_checkpoint="latest", **run)
    assert train(more) == 0
    assert "rescale_betas_zero_snr" not in capsys.readouterr().err  # nothing has changed
    output = Path(more.output_dir)
    known = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    assert known.items() <= scheduler_of(output).items()
    scheduler = DiffusionPipeline.from_pretrained(output).scheduler
    scheduler.set_timesteps(4)
    assert (type(scheduler), int(scheduler.timesteps[0]), float(scheduler.alphas_cumprod[-1])) == (DDIMScheduler, 999, 0.0)

    write_single_file(output, tmp_path / "trained.safetensors")
    for file in (
        tmp_path / "trained.safetensors", without_metadata(tmp_path / "trained.safetensors", tmp_path / "bare.safetensors"),
    ):  # fmt: skip
        plain = configuration(file, pipeline, tmp_path)
        folder = open_single_file(file, plain)
        assert_same(output, folder)
        assert known.items() <= scheduler_of(folder).items()
        assert float(open_family(plain).schedule.coefficients(torch.tensor([999]))[0]) == 0.0


def original_config(directory: Path, **params) -> str:
    unet = {"in_channels": 4, "out_channels": 4, "model_channels": 64, "attention_resolutions": [1], "num_res_blocks": 2,
            "channel_mult": [1, 2], "num_heads": 8, "transformer_depth": 1, "context_dim": 64}  # fmt: skip
    vae = {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 2, "z_channels": 4}
    given = {"linear_start": 0.001, "linear_end": 0.02, "timesteps": 1000, "unet_config": {"params": unet},
             "first_stage_config": {"params": {"ddconfig": vae}}} | params  # fmt: skip
    (directory / "model.yaml").write_text(yaml.safe_dump({"model": {"params": given}}))
    return str(directory / "model.yaml")


def test_the_original_configuration_is_followed(pipelines, tmp_path):
    write_single_file(pipelines[False], tmp_path / "own.safetensors")
    file = without_metadata(tmp_path / "own.safetensors", tmp_path / "model.safetensors")
    given = original_config(tmp_path, parameterization="v")
    family = open_family(configuration(file, pipelines[False], tmp_path, original_config=given))
    assert family.prediction_type == "v_prediction"
    scheduler = json.loads((family.encoding.path / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.001, 0.02)
    Path(given).write_text("model: {}")
    with pytest.raises(UserError, match=r"--original_config .*model.yaml: not the YAML of a Stable Diffusion"):
        open_family(configuration(file, pipelines[False], tmp_path, original_config=given))


def test_the_published_sizes_are_recognised():
    for options in ({"cross_attention_dim": 768, "attention_head_dim": 8},
                    {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
                     "upcast_attention": True}):  # fmt: skip
        with torch.device("meta"):
            unet = UNet2DConditionModel(**options)
        shapes = {UNET + name: tensor for name, tensor in _unet_tensors(unet)}
        found = _unet_config(shapes, second="use_linear_projection" in options)
        for name, value in found.items():
            expected = unet.config[name]
            assert value == (list(expected) if isinstance(expected, tuple) else expected), name


@pytest.mark.parametrize(
    ("names", "shape", "kind"),
    [
        (["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], (4, 4), r"an adapter \(LoRA\), no model"),
        (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], (4, 4), r"an adapter \(LoRA\)"),
        (["conditioner.embedders.1.model.ln_final.weight", f"{UNET}input_blocks.0.0.weight"], (320, 4, 3, 3), "Diffusion XL"),
        (["conditioner.embedders.0.model.ln_final.weight", f"{UNET}input_blocks.0.0.weight"], (384, 4, 3, 3), "the refiner"),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], (4, 4), "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], (4,), "FLUX"),
        ([f"{UNET}input_blocks.0.0.weight"], (320, 9, 3, 3), "Stable Diffusion for inpainting"),
        ([f"{UNET}input_blocks.0.0.weight"], (320, 8, 3, 3), r"Stable Diffusion for editing \(InstructPix2Pix\)"),
        (["first_stage_model.encoder.conv_in.weight"], (4, 4), "a VAE, which is one part"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], (4, 4), "a VAE, which is one part"),
        (["control_model.time_embed.0.weight", "control_model.input_hint_block.0.weight"], (4, 4), "a ControlNet"),
        (["down_blocks.0.resnets.0.conv1.weight"], (4, 4), "the UNet of a diffusers pipeline"),
        (["text_model.embeddings.token_embedding.weight"], (4, 4), "a text encoder"),
        (["emb_params"], (1, 768), "a textual inversion"),
        (["something.weight"], (4, 4), "none of the models that are known here"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_named(names, shape, kind, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name in names}, file)
    with pytest.raises(UserError, match=rf"other.safetensors: this is .*{kind}.*; what can be trained: Stable Diffusion 1.x"):
        open_family(configuration(file, tmp_path, tmp_path))


def test_damaged_and_incomplete_files_are_named(pipelines, tmp_path):
    file = tmp_path / "model.safetensors"
    write_single_file(pipelines[False], file)
    tensors, content = {name: tensor.clone() for name, tensor in load_file(file).items()}, file.read_bytes()
    config = configuration(file, pipelines[False], tmp_path)
    file.write_bytes(content[:5000])
    with pytest.raises(UserError, match=f"{file}: truncated or damaged"):
        open_family(config)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=f"{file}: a Git LFS pointer"):
        open_family(config)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage")}, file)
    with pytest.raises(UserError, match=rf"{file}: holds no VAE \(first_stage_model"):
        open_family(config)
    save_file({name: tensor for name, tensor in tensors.items() if name != f"{UNET}out.2.bias"}, file)
    with pytest.raises(UserError, match=f"{file}: incomplete, its unet lacks conv_out.bias"):
        open_family(config)


def test_a_tokenizer_must_come_from_somewhere(pipelines, tmp_path):
    file = tmp_path / "model.safetensors"
    write_single_file(pipelines[False], file)
    config = configuration(file, pipelines[False], tmp_path, tokenizer_name=None)
    with pytest.raises(UserError, match="a single file holds no tokenizer, and openai/clip.* give --tokenizer_name DIR"):
        open_family(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--tokenizer_name {tmp_path / 'empty'}"):
        open_family(config.model_copy(update={"tokenizer_name": str(tmp_path / "empty")}))


def test_other_families_and_missing_files_are_told(published, tmp_path):
    (tmp_path / "model.safetensors").touch()
    models = published("wuerstchen")
    prior = "pretrained_prior_model_name_or_path"
    config = TrainConfig.model_validate(
        {"family": "wuerstchen", "shards_dir": "x"} | models | {prior: str(tmp_path / "model.safetensors")}
    )
    with pytest.raises(UserError, match="a file; give a diffusers pipeline"):
        check_machine(config)
    (tmp_path / "model.gguf").touch()
    for name, named in (("https://huggingface.co/a/b/blob/main/model.safetensors", "an address; download the file"),
                        (tmp_path / "model.gguf", "no file of weights; single files are .safetensors")):  # fmt: skip
        with pytest.raises(UserError, match=named):
            check_machine(configuration(name, tmp_path, tmp_path))
    with pytest.raises(UserError, match=r"missing.ckpt: no such file"):
        check_machine(configuration(tmp_path / "missing.ckpt", tmp_path, tmp_path))
    with pytest.raises(UserError, match="not a single file, so leave out --original_config and --tokenizer_name"):
        open_family(configuration(tmp_path, tmp_path, tmp_path))
    with pytest.raises(UserError, match=f"or a single file: {tmp_path / 'model.safetensors'}"):
        check_machine(configuration(tmp_path, tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("file", "named"),
    [("out.safetensors", "a KandinskyV22PriorPipeline; only Stable Diffusion"), ("out.ckpt", "ends in .safet")],
)
def test_export_takes_stable_diffusion_only(file, named, published, tmp_path, monkeypatch):
    prior = published("kandinsky-prior")["pretrained_prior_model_name_or_path"]
    monkeypatch.setattr("sys.argv", ["export", "--model", prior, "--single_file", str(tmp_path / file)])
    with pytest.raises(UserError, match=named):
        export.main()
