"""What images can be drawn with: pipelines, outputs of trainings, checkpoints of them, and adapters over a base."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.catalogue import FAMILIES, INDEX, PARTS, PEFT_CONFIG, PEFT_WEIGHTS
from engine.config.command_line import CONFIG, read_toml
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.checkpoints.names import ADAPTERS, LATEST, MANIFEST, VECTORS, complete_checkpoints, step_of
from engine.messages import say

_USUAL = (*ADAPTERS.values(), PEFT_WEIGHTS)


@dataclass(frozen=True)
class Drawable:
    """What images are drawn with.

    name: what pictures call it.
    pipeline: the folder of the pipeline, or of one half of it.
    parts: its models whose weights a checkpoint has -> their folders there.
    adapters: files or folders of LoRA weights, each with its scale.
    """

    name: str
    pipeline: Path
    parts: dict[str, Path] = field(default_factory=dict)
    adapters: tuple[tuple[Path, float], ...] = ()


def locate(flag: str, path: Path, base: Path | None = None) -> Drawable:
    """What an option names.

    Args:
        base: the pipeline beneath a checkpoint or an adapter; else it is looked for in the output directory of the training.

    Raises:
        UserError: nothing to draw with, or its base is not known.
    """
    name = path.absolute().name
    if _is_checkpoint(path):
        return _of_checkpoint(flag, path, base)
    if (pipeline := _pipeline_in(path)) is not None:
        return Drawable(name, pipeline)
    if (adapter := path if path.is_file() else _result_of(path)) is not None:
        run = path if path.is_dir() else path.absolute().parent
        return Drawable(call(adapter), _base_of(flag, path, run, base), {}, ((adapter, 1.0),))
    if found := _checkpoints(path):
        say(f"{flag} {path}: the training has not ended; drawn with {found[-1].name}")
        return replace(_of_checkpoint(flag, found[-1], base), name=name)
    remedy = "give the output directory of a training that ended"
    if any((path / entry).exists() for entry in (LATEST, MANIFEST)):
        remedy = "make a pipeline of the checkpoint with `python -m engine.checkpoint export`"
    problem = f"no {INDEX} there" if path.is_dir() else "no such directory"
    raise UserError(f"{flag} {path}: {problem}; {remedy}")


def compared(paths: Sequence[Path], base: Path | None) -> list[Drawable]:
    """What `--compare` names: several, each by a name of its own, or all checkpoints of a training.

    Raises:
        UserError: there is nothing to compare.
    """
    if len(paths) > 1:
        found = [locate("--compare", path, base) for path in paths]
        return [
            replace(one, name=name) for one, name in zip(found, told_apart([one.name for one in found], paths), strict=True)
        ]
    checkpoints = _checkpoints(paths[0])
    if len(checkpoints) < 2:
        there = f"it has {len(checkpoints)}" if paths[0].is_dir() else "there is no such directory"
        raise UserError(f"--compare {paths[0]}: give two models, or the output directory of a training with checkpoints "
                        f"that diffusers can open, several of them (--openable_checkpoints); {there}")  # fmt: skip
    return [replace(_of_checkpoint("--compare", one, base), name=f"step {step_of(one)}") for one in checkpoints]


def call(adapter: Path) -> str:
    """What an adapter is called: as its file, or as its folder where files of all trainings are called the same."""
    return adapter.absolute().parent.name if adapter.name in _USUAL else adapter.name.removesuffix(".safetensors")


def told_apart(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names of paths; where two are the same, all with as many of the folders that they lie in as tell them apart."""
    names = list(names)
    for depth in range(2, 2 + max((len(path.absolute().parts) for path in paths), default=0)):
        if len({*names}) == len(names):
            break
        names = ["/".join(path.absolute().parts[-depth:]) for path in paths]
    return names


def _result_of(directory: Path) -> Path | None:
    """The adapter that a training left in its output directory, or that lies in a directory itself: its file, or of several
    files the directory."""
    if any((directory / file).is_file() for file in (*ADAPTERS.values(), PEFT_CONFIG)):
        return directory
    files = [file for file in directory.glob("*.safetensors") if file.is_file() and file.name not in VECTORS.values()]
    named = directory / f"{directory.resolve().name}.safetensors"  # of --save_format kohya
    return named if named in files else files[0] if len(files) == 1 else None


def _pipeline_in(directory: Path) -> Path | None:
    """The pipeline that a training left in its output directory, or that lies in a directory itself."""
    results = [directory / family.result for family in FAMILIES.values() if family.result]
    return next((one for one in (*results, directory) if (one / INDEX).is_file()), None)


def _is_checkpoint(path: Path) -> bool:
    return step_of(path) >= 0 and bool(_models_of(path) or _adapter_of(path))


def _checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a training that can be drawn with, oldest first."""
    return [path for path in complete_checkpoints(directory) if _is_checkpoint(path)]


def _models_of(checkpoint: Path) -> dict[str, Path]:
    """The models in a checkpoint: of those that have a moving average, that, which the training's result has too."""
    folders = {part: [checkpoint / f"{part}_ema", checkpoint / part] for part in PARTS}
    found = {part: next(filter(Path.is_dir, both), None) for part, both in folders.items()}
    return {part: folder for part, folder in found.items() if folder is not None}


def _adapter_of(checkpoint: Path) -> Path | None:
    return next((file for kind in ("ema", "weight") if (file := checkpoint / ADAPTERS[kind]).is_file()), None)


def _of_checkpoint(flag: str, checkpoint: Path, base: Path | None) -> Drawable:
    pipeline = _base_of(flag, checkpoint, checkpoint.absolute().parent, base)
    adapter = _adapter_of(checkpoint)
    return Drawable(checkpoint.name, pipeline, _models_of(checkpoint), ((adapter, 1.0),) if adapter else ())


def _base_of(flag: str, path: Path, run: Path, base: Path | None) -> Path:
    """The pipeline beneath a checkpoint or an adapter of a training.

    Of a configuration beside it, which may be a stranger's, only a folder on this machine is taken: nothing is fetched by it.
    """
    if base is not None:
        return base
    if (pipeline := _pipeline_in(run)) is not None:
        return pipeline
    if (run / CONFIG).is_file():
        values = read_toml(TrainConfig, run / CONFIG, str(run / CONFIG))
        family = values.get("family")
        named = values.get(FAMILIES[family].pipeline) if isinstance(family, str) and family in FAMILIES else None
        if isinstance(named, str) and "\0" not in named and (Path(named) / INDEX).is_file():
            return Path(named)
    how = "as --model" if flag != "--model" else "as --model, and this with --lora or --compare"
    raise UserError(f"{flag} {path}: give the pipeline that it was trained from {how}")
