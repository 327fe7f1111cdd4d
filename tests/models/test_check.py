"""What is known of a checkpoint before anything is encoded: missing parts, pointers, damage, unfitting weights, variants."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.pipelines.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTextModel

from engine import run
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.trainer import train
from engine.models.check import empty_model, load_model
from engine.models.family import open_family

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
MODEL, PRIOR, DECODER = (f"pretrained_{name}model_name_or_path" for name in ("", "prior_", "decoder_"))
UNET = "unet/diffusion_pytorch_model.safetensors"
RESOLUTION = {"sd": 16, "kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}


@pytest.fixture
def copied(published, tmp_path):
    """(family, option, **options) -> a configuration with a copy of the pipeline that the option names, and the copy."""

    def copy(family: str, option: str, **options) -> tuple[TrainConfig, Path]:
        models = published(family)
        directory = tmp_path / "copy"
        shutil.copytree(models[option], directory)
        values = {"family": family, "resolution": RESOLUTION[family], "output_dir": str(tmp_path / "out"), "report_to": "none"}
        return TrainConfig.model_validate(values | models | {option: str(directory)} | options), directory

    return copy


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def list_safety_checker(pipeline: Path) -> None:
    parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
             "feature_extractor": ["transformers", "CLIPFeatureExtractor"]}  # fmt: skip
    change(pipeline / "model_index.json", **parts)


def write_safety_checker(pipeline: Path) -> None:
    list_safety_checker(pipeline)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=small, vision_config=small | vision, projection_dim=16)
    StableDiffusionSafetyChecker(config).save_pretrained(pipeline / "safety_checker")
    CLIPImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(pipeline / "feature_extractor")


WEIGHTS = [
    ("sd", MODEL, "unet"), ("sd", MODEL, "vae"), ("sd", MODEL, "text_encoder"),
    ("kandinsky-prior", PRIOR, "prior"), ("kandinsky-prior", PRIOR, "image_encoder"), ("kandinsky-prior", DECODER, "movq"),
    ("kandinsky-decoder", DECODER, "unet"), ("kandinsky-decoder", PRIOR, "prior"),
    ("wuerstchen", PRIOR, "prior"), ("wuerstchen", DECODER, "decoder"), ("wuerstchen", DECODER, "vqgan"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "option", "part"), WEIGHTS)
def test_pointers_and_truncated_and_missing_weights_are_named(family, option, part, copied):
    config, pipeline = copied(family, option, validation_prompts=["a cat"])
    (weights,) = (pipeline / part).glob("*.safetensors")
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b"", b"<!DOCTYPE html>" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{weights}: truncated or damaged, download it again"):
            open_family(config).check_files()
    weights.write_text(POINTER)
    with pytest.raises(UserError, match=f"{weights}: a Git LFS pointer, not the file itself; run `git lfs pull`"):
        open_family(config).check_files()
    weights.unlink()
    with pytest.raises(UserError, match=f"{part}: no weights there, the download is incomplete"):
        open_family(config).check_files()


@pytest.mark.parametrize(("family", "option", "part"), WEIGHTS)
def test_weights_that_do_not_fit_are_named(family, option, part, copied):
    config, pipeline = copied(family, option, validation_prompts=["a cat"])
    open_family(config).check_files()
    (weights,) = (pipeline / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}: the weights do not fit config.json: .*{name} is missing"):
        open_family(config).check_files()
    save_file(tensors | {name: torch.zeros(3, 5)}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} is \[3, 5\], by the configuration \["):
        open_family(config).check_files()
    save_file(tensors | {"more": torch.zeros(1)}, weights, {"format": "pt"})
    open_family(config).check_files()  # what is left over the libraries leave out


def test_nothing_is_encoded_before_and_the_exit_code_is_2(copied, images, tmp_path, monkeypatch, capsys):
    config, pipeline = copied("sd", MODEL)
    (pipeline / UNET).write_text(POINTER)
    command = ["run", "--family", "sd", f"--{MODEL}", str(pipeline), "--train_data_dir", str(images), "--resolution", "16",
               "--output_dir", config.output_dir, "--max_train_steps", "1"]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    assert run.exit_code("engine.run", run.main) == 2
    assert "git lfs pull" in capsys.readouterr().err
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    "file", ["model_index.json", "vae/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"]
)
def test_a_pointer_in_the_place_of_a_configuration_is_named(file, copied):
    config, pipeline = copied("sd", MODEL)
    (pipeline / file).write_text(POINTER)
    with pytest.raises(UserError, match=f"{pipeline / file}: a Git LFS pointer"):
        open_family(config).check_files()
    (pipeline / file).write_text("{")
    with pytest.raises(UserError, match=str((pipeline / file).parent)):
        open_family(config).check_files()


def test_a_tokenizer_without_its_vocabulary_is_refused(copied):
    config, pipeline = copied("sd", MODEL)
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer: neither tokenizer.json nor vocab.json and merges.txt"):
        open_family(config)


def test_a_file_that_may_not_be_read_is_named(copied, monkeypatch):
    config, pipeline = copied("sd", MODEL)
    opened = Path.open

    def forbid(path, *arguments, **options):
        if path == pipeline / UNET:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(UserError, match=f"{pipeline / UNET}: cannot be read: Permission denied"):
        open_family(config).check_files()


def test_quantised_weights_are_refused(copied):
    config, pipeline = copied("sd", MODEL)
    change(pipeline / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match="unet: holds quantised weights"):
        open_family(config).check_files()


def test_pieces_and_pickles_are_read_as_the_libraries_read_them(copied):
    config, pipeline = copied("sd", MODEL)
    expected = open_family(config).published_model().state_dict()
    model = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    (pipeline / UNET).unlink()
    model.save_pretrained(pipeline / "unet", max_shard_size="400KB")
    pieces = sorted((pipeline / "unet").glob("*-of-*.safetensors"))
    assert len(pieces) > 1
    found = open_family(config)
    found.check_files()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.published_model().state_dict().items())
    pieces[1].unlink()
    with pytest.raises(UserError, match=f"names {pieces[1].name}, not there; the download is incomplete"):
        open_family(config).check_files()
    for file in (pipeline / "unet").glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(pipeline / "unet", safe_serialization=False)
    open_family(config).check_files()
    pickled = pipeline / "unet" / "diffusion_pytorch_model.bin"
    pickled.write_bytes(pickled.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{pickled}: truncated or damaged"):
        open_family(config).check_files()


def rename(pipeline: Path, *parts: str) -> None:
    """Makes fp16 variants of the parts' weights."""
    for part in parts:
        for file in (pipeline / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))


def test_variants_that_are_there_are_named(copied):
    config, pipeline = copied("sd", MODEL)
    rename(pipeline, "vae")
    with pytest.raises(UserError, match="vae: no weights there, only of variant fp16: give --variant fp16"):
        open_family(config).check_files()
    rename(pipeline, "unet", "text_encoder")
    with pytest.raises(UserError, match="only of variant fp16: give --variant fp16"):
        open_family(config).check_files()
    wrong = config.model_copy(update={"variant": "bf16"})
    with pytest.raises(UserError, match="only of variant fp16: give --variant fp16"):
        open_family(wrong).check_files()


@pytest.mark.parametrize("parts", [("vae",), ("unet", "text_encoder"), ("unet", "vae", "text_encoder")])
def test_mixed_folders_train_as_diffusers_opens_them(parts, copied, images, capsys):
    config, pipeline = copied("sd", MODEL, variant="fp16", train_data_dir=str(images), max_train_steps=1)
    rename(pipeline, *parts)
    assert train(config) == 0
    assert sorted(path.name for path in Path(config.output_dir).glob("*/*model.safetensors")) == [
        "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors",
    ]  # fmt: skip


def test_a_safety_checker_that_is_listed_and_not_there_is_left_out_and_said(copied, images, capsys):
    config, pipeline = copied("sd", MODEL, train_data_dir=str(images), max_train_steps=1)
    list_safety_checker(pipeline)
    assert train(config) == 0
    said = "model_index.json lists feature_extractor and safety_checker, not there: left out"
    assert capsys.readouterr().err.count(said) == 1
    index = json.loads((Path(config.output_dir) / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]


def test_a_safety_checker_that_is_there_is_exported(copied, images, capsys):
    config, pipeline = copied("sd", MODEL, train_data_dir=str(images), max_train_steps=1)
    write_safety_checker(pipeline)
    assert train(config) == 0
    assert (Path(config.output_dir) / "safety_checker" / "model.safetensors").is_file()
    (pipeline / "safety_checker" / "model.safetensors").write_text(POINTER)
    with pytest.raises(UserError, match="safety_checker/model.safetensors: a Git LFS pointer"):
        open_family(config).check_files()


def test_a_part_that_the_index_lacks_or_names_by_an_unknown_class_is_refused(copied):
    config, pipeline = copied("sd", MODEL)
    change(pipeline / "model_index.json", scheduler=[None, None])
    with pytest.raises(UserError, match=r"model_index.json: lists no scheduler; give a complete diffusers pipeline"):
        open_family(config).check_files()
    change(pipeline / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    with pytest.raises(UserError, match="scheduler is a diffusers.NoSuchScheduler, which the installed libraries do not have"):
        open_family(config).check_files()


def test_weights_of_the_frozen_models_are_looked_at_before_shards_are_built(copied):
    for family, option, part in (("sd", MODEL, "vae"), ("kandinsky-decoder", PRIOR, "image_encoder")):
        config, pipeline = copied(family, option)
        (weights,) = (pipeline / part).glob("*.safetensors")
        weights.write_text(POINTER)
        with pytest.raises(UserError, match=f"{weights}: a Git LFS pointer"):
            open_family(config).encoding.encoder_identity()
        shutil.rmtree(pipeline)


@pytest.mark.parametrize(("family", "option", "parts"), [
    ("kandinsky-prior", PRIOR, ("prior", "image_encoder", "text_encoder")), ("kandinsky-decoder", DECODER, ("unet",)),
    ("wuerstchen", PRIOR, ("prior", "text_encoder")),
])  # fmt: skip
def test_every_family_reads_variants(family, option, parts, copied, photographs):
    config, pipeline = copied(family, option, variant="fp16", train_data_dir=str(photographs), max_train_steps=1,
                              max_train_samples=2, train_batch_size=1)  # fmt: skip
    rename(pipeline, *parts)
    assert train(config) == 0


def test_a_pointer_in_the_place_of_the_image_encoder_is_named(copied, tmp_path):
    config, _ = copied("wuerstchen", PRIOR, pretrained_image_encoder_name_or_path=str(tmp_path / "encoder.pt"))
    (tmp_path / "encoder.pt").write_text(POINTER)
    with pytest.raises(UserError, match=r"encoder.pt: a Git LFS pointer"):
        open_family(config).encoding.encoder_identity()


def test_published_names_that_the_libraries_translate_are_no_damage(copied):
    """Old attention of VAEs, position numbers in CLIP, and the doubled prefix of the safety checker."""
    config, pipeline = copied("sd", MODEL)
    write_safety_checker(pipeline)
    positions = {"embeddings.position_ids": torch.arange(16)[None]}
    for part, prefix, more in (("text_encoder", "text_model.", positions), ("safety_checker", "vision_model.", {})):
        (file,) = (pipeline / part).glob("*.safetensors")
        stored = load_file(file) | more
        outer = prefix if part == "text_encoder" else ""
        save_file({outer + name.replace(prefix, prefix * 2): tensor for name, tensor in stored.items()}, file)
    vae = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        save_file({name.replace(f"attentions.0.{new}", f"attentions.0.{old}"): t for name, t in load_file(vae).items()}, vae)
    assert any("proj_attn" in name for name in load_file(vae))
    open_family(config).check_files()


def test_names_on_the_hub_are_looked_at_alike(model, tmp_path):
    cache = tmp_path / "models--org--model"
    for revision, parts in (("main", ("unet", "vae", "text_encoder")), ("non-ema", ())):
        snapshot = cache / "snapshots" / revision.ljust(40, "0")
        shutil.copytree(model, snapshot)
        rename(snapshot, *parts)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(snapshot.name)
    values = {"family": "sd", MODEL: "org/model", "cache_dir": str(tmp_path), "resolution": 16, "shards_dir": "unused"}
    config = TrainConfig.model_validate(values | {"variant": "fp16", "non_ema_revision": "non-ema"})
    family = open_family(config)
    family.check_files()
    assert family.unet.parent.name.startswith("non-ema")
    assert family.pipeline({family.part: family.published_model()}).config["_name_or_path"] == "org/model"
    (snapshot / UNET).write_text(POINTER)
    with pytest.raises(UserError, match=f"{snapshot / UNET}: a Git LFS pointer"):
        open_family(config).check_files()
    for changes, named in (({"non_ema_revision": "nope"}, "neither a directory"), ({"variant": None}, "give --variant fp16")):
        with pytest.raises(UserError, match=named):
            open_family(TrainConfig.model_validate(values | {"variant": "fp16"} | changes)).check_files()


@pytest.mark.parametrize("model", [WuerstchenDiffNeXt, WuerstchenPrior, PaellaVQModel, UNet2DConditionModel, PriorTransformer])
def test_models_of_the_published_sizes_are_made_to_be_compared(model):
    """Their defaults are the sizes of the published ones, which a bound on layers must not refuse."""
    made = empty_model({}, model)
    assert isinstance(made, model)
    assert all(parameter.is_meta for parameter in made.parameters())


def test_a_tokenizer_under_another_name_of_its_library_is_taken(copied):
    config, pipeline = copied("wuerstchen", PRIOR)
    change(pipeline / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    open_family(config).check_files()


def test_a_pipeline_without_a_word_on_its_safety_checker_is_taken(copied):
    config, pipeline = copied("sd", MODEL)
    change(pipeline / "model_index.json", requires_safety_checker=None)
    open_family(config).check_files()


@pytest.mark.parametrize("remains", [0, 1])
def test_weights_that_went_after_they_were_checked_are_not_drawn_at_random(remains, copied):
    _, pipeline = copied("sd", MODEL)
    file = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    if remains:
        save_file(dict(list(tensors.items())[:remains]), file)
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"text_encoder: cannot be loaded: .* is missing"):
        load_model(file.parent, CLIPTextModel, None, torch.float32)


@pytest.mark.parametrize("value", [0.5, "flow", ["epsilon"]], ids=str)
def test_a_prediction_that_nothing_trains_is_refused_by_its_file(value, copied):
    config, pipeline = copied("kandinsky-decoder", DECODER)
    change(pipeline / "scheduler" / "scheduler_config.json", prediction_type=value)
    with pytest.raises(UserError, match=r"scheduler_config.json: its prediction_type is"):
        open_family(config).check_files()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "x"), "Input/output error; mend what is wrong with that place"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 9 bytes"), "can't allocate memory"),
    ],
    ids=["disk", "memory"],
)
@pytest.mark.parametrize("reader", ["engine.models.weights.load_file", "engine.models.check.read_config"])
def test_the_machines_faults_are_not_the_files(reader, error, said, copied, monkeypatch):
    _, pipeline = copied("sd", MODEL)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(reader, fail)
    with pytest.raises((UserError, RuntimeError), match=said) as raised:
        load_model(pipeline / "unet", UNet2DConditionModel, None, torch.float32)
    assert "download it again" not in str(raised.value)
