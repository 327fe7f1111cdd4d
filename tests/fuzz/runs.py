"""What runs leave: checkpoints, the pointer to the latest, and the configuration in TOML."""

import functools
import json
import shutil
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file, save_file

from engine import checkpoint
from engine.config.command_line import load, parse, read_toml
from engine.config.options import TrainConfig
from engine.data.format.reader import Shards
from engine.data.samples.batch import BatchPlan
from engine.data.samples.order import order_of
from engine.data.samples.streams import Stream, Streams
from engine.files import digest, discard
from engine.loop.checkpoints.layout import open_checked, or_another
from engine.loop.checkpoints.models import whole_parameters
from engine.loop.prepare import open_run
from engine.loop.resume import find_checkpoint, open_checkpoint
from engine.loop.trainer import Training, train
from engine.models.family import open_family
from engine.processes import Processes
from tests.fuzz.judge import Broken, Kind, Place
from tests.fuzz.mutations import (
    STRANGE_TEXTS,
    mutate_file,
    mutate_folder,
    mutated_bytes,
    mutated_json,
    mutated_value,
    rewrite,
    text_of,
)
from tests.tiny import write_images, write_pipeline


def trained(support: Path) -> Path:
    """An output directory with the checkpoints of two steps, the same for all kinds."""
    root = support.parent / "trained"
    output = root / "output"
    if not (output / "model_index.json").exists():
        discard(root)
        model, images = write_pipeline(root / "model"), write_images(root / "images", 4)
        config = TrainConfig(
            family="sd", pretrained_model_name_or_path=str(model), train_data_dir=str(images), output_dir=str(output),
            resolution=16, center_crop=True, train_batch_size=2, max_train_steps=2, checkpointing_steps=1, seed=1, use_ema=True,
            report_to="none", quiet=True,
        )  # fmt: skip
        assert train(config) == 0
    return output


def make_checkpoint(whole: Path) -> None:
    """One of one process, and the same as two would have written it."""
    one = Path(shutil.copytree(trained(whole.parent) / "checkpoint-2", whole / "checkpoint-2"))
    two = Path(shutil.copytree(one, whole.parent / "two" / "checkpoint-2"))
    tensors = load_file(one / "rank-0.safetensors")
    for rank in range(2):
        save_file(dict(_share(name, tensor, rank) for name, tensor in tensors.items()), two / f"rank-{rank}.safetensors")
    state = json.loads((two / "state.json").read_text()) | {"world": 2}
    (two / "state.json").write_text(json.dumps(state))
    write_manifest(two)
    two.rename(whole / "checkpoint-of-two")


def _share(name: str, tensor: torch.Tensor, rank: int) -> tuple[str, torch.Tensor]:
    """What one of two processes holds of a tensor; what is no slice they both hold."""
    if "@" not in name:
        return name, tensor
    whole, _ = name.rsplit("@", 1)
    half = len(tensor) // 2
    return (f"{whole}@{half}", tensor[half:].clone()) if rank else (f"{whole}@0", tensor[:half].clone())


def write_manifest(checkpoint: Path) -> None:
    """Has the manifest say what is there."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    manifest = {path.relative_to(checkpoint).as_posix(): digest(path) for path in files}
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _file_of_state(checkpoint: Path, random: Random) -> Path:
    return random.choice([checkpoint / "state.json", *sorted(checkpoint.glob("rank-*")) * 2])


def mutate_checkpoint(folder: Path, random: Random) -> str:
    """Alters a file that the manifest names, or which there are."""
    if random.random() < 0.3:
        return mutate_folder(folder, random)
    return mutate_file(_file_of_state(folder, random), random)


def mutate_manifest(folder: Path, random: Random) -> str:
    path = folder / "manifest.json"
    if random.random() < 0.3:
        rewrite(
            path,
            random.choice((b"{}", b"[]", b"null", b"{", json.dumps({"state.json": digest(folder / "state.json")}).encode())),
        )
    else:
        rewrite(path, mutated_json(path.read_bytes(), random))
    what = mutate_file(folder / "rank-0.safetensors", random) if random.random() < 0.5 else ""
    return f"manifest.json altered, {what}"


def mutate_checkpoint_and_manifest(folder: Path, random: Random) -> str:
    """Alters a file, and has the manifest say its new digest."""
    what = mutate_file(_file_of_state(folder, random), random)
    write_manifest(folder)
    return what


@functools.cache
def training_beside(support: Path) -> tuple[TrainConfig, Training]:
    """The run that the checkpoints of a base are of, before its first step."""
    file = trained(support) / "config.toml"
    config = load(TrainConfig, read_toml(TrainConfig, file, str(file)))
    processes = Processes().connect()
    shards, plan = Shards(config.shards_path), BatchPlan(config.train_batch_size, 1, 0, 1)
    family = open_family(config)
    stream = Stream(shards, order_of(1, shards.index.shards["records"], None), len(shards))
    run = open_run(config, 1, Streams(1, [stream]), plan, None)
    return config, Training(config, run, family, family.load_model(), processes)


def read_checkpoint(place: Place) -> Any:
    """Describes and verifies a checkpoint, goes on from it, and puts the parameters together that an export writes."""
    directory = str(place.given)
    checkpoint.info_command([directory])
    checkpoint.verify_command([directory])
    config, training = training_beside(place.support)
    opened = open_checkpoint(place.given, config, Processes())
    training.resume(opened)
    shapes = training.partition.shapes
    with or_another(place.given):
        opened.files.check_model(shapes)
        exported = {kind: dict(whole_parameters(opened.files, kind, shapes, {})) for kind in ("weight", "ema")}
    _require_whole(place.given, training)
    tensors = [tensor for kind in exported.values() for tensor in kind.values()]
    partition = training.partition
    states = [{"master": master, **partition.optimizer.state_of(master)} for master in partition.masters]
    tensors += [value for state in states for value in state.values() if torch.is_tensor(value)]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise Broken("numbers that are not finite were taken over")
    if training.step < 0 or training.metrics.steps < 0:
        raise Broken(f"goes on at step {training.step}, {training.metrics.steps} steps in the metrics")
    return [hash(tensor.numpy().tobytes()) for tensor in tensors], training.step, training.metrics.steps


def _require_whole(directory: Path, training: Training) -> None:
    """Every element of every parameter lies in one slice, by the headers of all files."""
    pieces: dict[str, list[tuple[int, int]]] = {}
    for path in directory.glob("rank-*.safetensors"):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for name, tensor in header.items():
            if "@" in name:
                whole, start = name.rsplit("@", 1)
                begin, end = tensor["data_offsets"]
                pieces.setdefault(whole, []).append((int(start), int(start) + (end - begin) // 4))
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        for name, shape in training.partition.shapes.items():
            end = 0
            for start, stop in sorted(pieces.pop(f"{kind}/{name}", [])):
                if start != end:
                    raise Broken(f"slices of {kind}/{name} overlap or leave a gap at {start}")
                end = stop
            if end != shape.numel():
                raise Broken(f"slices of {kind}/{name} hold {end} of {shape.numel()} elements")
    if pieces:
        raise Broken(f"slices of what the model does not have: {', '.join(pieces)[:100]}")


def make_output(whole: Path) -> None:
    """An output directory with two checkpoints and the pointer to the latest."""
    output = trained(whole.parent)
    (whole / "run").mkdir()
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(output / name, whole / "run" / name, ignore=lambda *_: ["unet", "unet_ema"])
        manifest = json.loads((whole / "run" / name / "manifest.json").read_text())
        kept = {file: value for file, value in manifest.items() if "/" not in file}
        (whole / "run" / name / "manifest.json").write_text(json.dumps(kept))
    (whole / "run" / "latest").write_text("checkpoint-2\n")


def mutate_latest(folder: Path, random: Random) -> str:
    path = folder / "latest"
    match random.randrange(6):
        case 0:
            rewrite(path, mutated_bytes(path.read_bytes(), random))
        case 1:
            strange = (
                "../outside",
                "../../outside/checkpoint-9",
                "checkpoint-1/../checkpoint-2",
                "checkpoint-3",
                "checkpoint-²",
            )
            rewrite(path, random.choice((*STRANGE_TEXTS, *strange)).encode("utf-8", "surrogatepass"))
        case 2:
            path.unlink()
            path.mkdir()
        case 3:
            mutate_folder(folder / "checkpoint-2", random)
        case 4:
            (folder / "checkpoint-2").rename(
                folder
                / random.choice(("checkpoint-x", "checkpoint-", "checkpoint-²", "checkpoint--1", "checkpoint-" + "9" * 200))
            )
        case _:
            (folder / random.choice(("checkpoint-3", "checkpoint-³", "checkpoint-00002", "checkpoint-4.partial"))).symlink_to(
                random.choice(("checkpoint-1", "../../outside/checkpoint-9", "nowhere"))
            )
    return "latest, or what it names"


def read_output(place: Place) -> Any:
    checkpoint.info_command([str(place.given)])
    config = _config_beside(place).model_copy(update={"output_dir": str(place.given), "resume_from_checkpoint": "latest"})
    found = find_checkpoint(config)
    if found is None:
        return None
    if found.resolve().parent != place.given.resolve():
        raise Broken(f"goes on from {found}")
    return open_checked(found, whole=True).state.step


@functools.cache
def _read_config(file: Path) -> TrainConfig:
    return load(TrainConfig, read_toml(TrainConfig, file, str(file)))


def _config_beside(place: Place) -> TrainConfig:
    return _read_config(trained(place.support) / "config.toml")


def make_config(whole: Path) -> None:
    (whole / "run").mkdir()
    output = trained(whole.parent)
    shutil.copy(output / "config.toml", whole / "run")


def mutate_config(folder: Path, random: Random) -> str:
    path = folder / "config.toml"
    content = path.read_bytes()
    if random.random() < 0.2:
        rewrite(path, mutated_bytes(content, random))
        return "bytes"
    altered = mutated_value(tomllib.loads(content.decode()), random)
    try:
        rewrite(
            path,
            text_of(
                altered if isinstance(altered, dict) else {"x": altered}, lambda value: tomli_w.dumps(_toml(value)), random
            ),
        )
    except (TypeError, ValueError):  # of what TOML cannot say
        rewrite(path, mutated_bytes(content, random))
    return "config.toml altered"


def _toml(value: Any) -> Any:
    """A value without what TOML has no word for."""
    match value:
        case dict():
            return {str(key): _toml(inner) for key, inner in value.items() if inner is not None}
        case list():
            return [_toml(inner) for inner in value if inner is not None]
    return value


def read_config(place: Place) -> Any:
    """Reads a configuration as a training does up to its checks, and, where there is time, exports by it."""
    file = str(place.given / "config.toml")
    config = parse(TrainConfig, "engine.run", "", ["--config", file, "--output_dir", str(place.output / "run")])
    open_family(config)
    if place.thorough:
        arguments = [str(trained(place.support) / "checkpoint-2"), "--config", file, "--output_dir", str(place.output)]
        checkpoint.export_command(arguments)
    return None


KINDS = {
    "checkpoints": Kind("checkpoints", make_checkpoint, mutate_checkpoint, read_checkpoint, guarded=True),
    "checkpoints-manifest": Kind("checkpoints", make_checkpoint, mutate_manifest, read_checkpoint, guarded=True),
    "checkpoints-consistent": Kind("checkpoints", make_checkpoint, mutate_checkpoint_and_manifest, read_checkpoint),
    "latest": Kind("latest", make_output, mutate_latest, read_output),
    "config": Kind("config", make_config, mutate_config, read_config),
}
