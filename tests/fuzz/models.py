"""Models as strangers send them: folders of pipelines of every family, and single files."""

import functools
import json
import sys
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from engine import export, sample
from engine.config.options import TrainConfig
from engine.data.sources.interface import refusing
from engine.loop.export import save_pipeline
from engine.models.adapter import DOWN, MAGNITUDE, UP, Adapter, adaptable_layers, read_adapter, write_adapter
from engine.models.family import open_family
from engine.models.low_rank import open_parts
from engine.models.original_layout import write_single_file
from engine.models.pipelines import open_pipeline
from examples.tiny_models import WRITERS
from tests.fuzz.judge import Broken, Kind, Place
from tests.fuzz.mutations import OUTSIDE, mutate_file, mutate_folder, plant, rewrite
from tests.models.test_single_file import write_pipeline as write_regular_pipeline

RESOLUTION = {"sd": 16, "kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}
# The options that name a family's pipelines -> their folders within a base.
FOLDERS = {
    "pretrained_model_name_or_path": "pipeline",
    "pretrained_prior_model_name_or_path": "prior",
    "pretrained_decoder_model_name_or_path": "decoder",
}


def make_pipelines(family: str, whole: Path) -> None:
    WRITERS[family](whole / "models")


def mutate_pipeline(folder: Path, random: Random) -> str:
    """Alters a file of a pipeline or which there are, or has its files name programs beside them."""
    pipelines = sorted(path.parent for path in folder.glob("*/model_index.json"))
    pipeline = random.choice(pipelines)
    chance = random.random()
    if chance < 0.2:
        return mutate_folder(pipeline, random)
    if chance < 0.35:
        return plant_program(pipeline, random)
    files = [path for path in sorted(pipeline.rglob("*")) if path.is_file()]
    small = [path for path in files if path.suffix != ".safetensors"]
    return mutate_file(random.choice(files if chance < 0.5 else small), random)


def plant_program(pipeline: Path, random: Random) -> str:
    """Puts programs into a part, or beside all, and names them where libraries look for names of classes."""
    parts = [path for path in sorted(pipeline.iterdir()) if path.is_dir()]
    part = random.choice(parts)
    outside = next(parent / OUTSIDE for parent in pipeline.parents if (parent / OUTSIDE).is_dir())
    for folder in (part, pipeline):
        plant(folder, outside)
    edits: list[tuple[Path, dict[str, Any]]] = [
        (pipeline / "model_index.json", {part.name: ["evil", "Evil"]}),
        (pipeline / "model_index.json", {part.name: [part.name, "Evil"]}),
        (pipeline / "model_index.json", {"_class_name": ["evil", "Evil"]}),
        (pipeline / "model_index.json", {"_class_name": "Evil"}),
        (pipeline / "model_index.json", {"evil": ["evil", "Evil"]}),
        (pipeline / "model_index.json", {part.name: ["subprocess", "Popen"]}),
    ]
    maps = dict.fromkeys(("AutoModel", "AutoConfig", "AutoImageProcessor", "AutoProcessor"), "evil.Evil")
    for file in sorted(part.glob("*.json")):
        if isinstance(json.loads(file.read_text()), dict):
            edits.append((file, {"auto_map": maps | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "trust_remote_code": True}))
            edits.append((file, {"_class_name": "Evil", "model_type": "evil", "tokenizer_class": "Evil"}))
    file, values = random.choice(edits)
    rewrite(file, json.dumps(json.loads(file.read_text()) | values).encode())
    return f"a program in {part.name}, named in {file.name}: {', '.join(values)}"


def configuration(family: str, place: Place, **paths: str) -> TrainConfig:
    return TrainConfig.model_validate({
        "family": family, "train_data_dir": "unused", "output_dir": str(place.output), "resolution": RESOLUTION[family],
        "cache_dir": str(place.output / "cache"), "report_to": "none", **paths,
    })  # fmt: skip


def read_pipelines(family: str, place: Place) -> Any:
    """Opens a family by folders as a training does, loads all its parts, encodes a caption, and now and then exports."""
    models = place.given
    options = {option: str(models / name) for option, name in FOLDERS.items() if (models / name).exists()}
    if family == "wuerstchen":
        options["pretrained_image_encoder_name_or_path"] = str(models / "efficientnet.safetensors")
    return use(family, place, options)


def use(family: str, place: Place, options: dict[str, str]) -> Any:
    opened = open_family(configuration(family, place, **options))
    opened.check_files()
    opened.encoding.encoder_identity()
    model = opened.published_model()
    if family == "sd" and opened.encoding.path.is_relative_to(place.given):
        _require_stored(model, opened.encoding.path / "unet")
    if family != "wuerstchen":  # whose image encoder has its full size
        with opened.encoding.encoder(torch.device("cpu")) as encoder, refusing("caption cannot be encoded"):
            if opened.encoding.captioned:
                encoder.encode_captions(["a red square"])
    if place.thorough:
        save_pipeline(place.output, opened, model, model.state_dict().items())
    return None


def _require_stored(model: Any, folder: Path) -> None:
    """A loaded model holds what its file does."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in model.state_dict().items():
        if name not in stored or not torch.equal(stored[name].float(), tensor):
            if name in stored and not stored[name].float().isfinite().all():
                continue
            raise Broken(f"{name} is loaded as something else than its file holds")


def read_sampled(place: Place) -> Any:
    """Opens a pipeline as `engine.sample` does, and now and then draws with it."""
    if not place.thorough:
        open_pipeline(place.given / "pipeline", None, torch.float32)
        return None
    size = ["--resolution", "16", "--images_per_prompt", "1", "--num_inference_steps", "1"]
    picture = ["--prompts", "a red square", "--output", str(place.output / "picture.png")]
    return command(sample.main, "--model", str(place.given / "pipeline"), *size, *picture)


def read_exported(place: Place) -> Any:
    """Writes a pipeline into a single file."""
    return command(export.main, "--model", str(place.given / "pipeline"), "--single_file", str(place.output / "x.safetensors"))


def command(main: Any, *arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["command", *arguments]):
        return main()


def make_single_files(whole: Path) -> None:
    """With the configurations of the engine in it, and as others write it, which is recognised."""
    pipeline = write_regular_pipeline(whole.parent)
    write_single_file(pipeline, whole / "own.safetensors")
    tensors = load_file(whole / "own.safetensors")
    save_file(tensors, whole / "other.safetensors")
    torch.save({"state_dict": tensors}, whole / "model.ckpt")


def mutate_single_file(path: Path, random: Random) -> str:
    if path.suffix in (".ckpt", ".bin") and random.random() < 0.2:
        path.unlink()
        torch.save({"state_dict": Evil(next(parent / OUTSIDE for parent in path.parents if (parent / OUTSIDE).is_dir()))}, path)
        return "a program in a pickle"
    return mutate_file(path, random)


class Evil:
    """Opened without care, this pickle leaves a mark."""

    def __init__(self, outside: Path) -> None:
        self.mark = outside / "ran"

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def read_single_file(place: Place) -> Any:
    tokenizer = place.support / "pipeline" / "tokenizer"
    paths = {"pretrained_model_name_or_path": str(place.given), "tokenizer_name": str(tokenizer)}
    config = configuration("sd", place, **paths)
    opened = open_family(config)
    opened.check_files()
    opened.published_model()
    return None


def make_adapters(whole: Path) -> None:
    """An adapter of some layers in every form, and in a pickle, beside the pipeline that it is of."""
    WRITERS["sd"](whole.parent)
    parts = open_parts(whole.parent / "pipeline")
    layers = (
        "unet.conv_in",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.encoder.layers.0.mlp.fc1",
    )
    tensors, alphas = {}, {}
    for layer in layers:
        out, *inner = adaptable_layers(parts)[layer].weight.shape
        tensors[layer + DOWN], tensors[layer + UP] = torch.ones(2, *inner), torch.ones(out, 2, *(1 for _ in inner[1:]))
        tensors[layer + MAGNITUDE] = torch.ones((1, out, 1, 1) if inner[1:] else out)
        alphas[layer] = 1.0 + len(alphas)
    adapter = Adapter(tensors, alphas)
    write_adapter(whole / "theirs.safetensors", adapter)
    write_adapter(whole / "kohya.safetensors", adapter, "kohya")
    write_adapter(whole / "peft", adapter, "peft")
    torch.save(load_file(whole / "kohya.safetensors"), whole / "pickle.bin")


def mutate_adapter(path: Path, random: Random) -> str:
    if path.is_dir() and random.random() < 0.5:
        return mutate_folder(path, random)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return mutate_single_file(random.choice(files), random)


def read_an_adapter(place: Place) -> Any:
    """Reads an adapter as a training does, and now and then merges it into its pipeline."""
    pipeline = place.support / "pipeline"
    parts = open_parts(pipeline)
    adapter = read_adapter(place.given, parts)
    if not all(torch.isfinite(tensor.float()).all() for tensor in adapter.tensors.values()):
        raise Broken("a tensor is not finite")
    if place.thorough:
        command(export.main, "--model", str(pipeline), "--merge", str(place.given), "--output", str(place.output / "merged"))
    return None


KINDS = {
    f"models-{family}": Kind(
        family, functools.partial(make_pipelines, family), mutate_pipeline, functools.partial(read_pipelines, family)
    )
    for family in WRITERS
} | {
    "models-sampled": Kind("sd", functools.partial(make_pipelines, "sd"), mutate_pipeline, read_sampled),
    "models-exported": Kind("sd", functools.partial(make_pipelines, "sd"), mutate_pipeline, read_exported),
    "single-files": Kind("single-files", make_single_files, mutate_single_file, read_single_file),
    "adapters": Kind("adapters", make_adapters, mutate_adapter, read_an_adapter),
}
