"""Describes, verifies and exports checkpoints, on any machine: `python -m engine.checkpoint info|verify|export DIR`."""

import os
import sys
from pathlib import Path
from typing import Any

from engine.catalogue import FAMILIES, IMAGE_ENCODER, PIPELINES
from engine.config.checks import check_writable
from engine.config.command_line import CONFIG, Parser, choose, load, open_any, read_toml
from engine.config.options import TrainConfig
from engine.errors import UserError, exit_code, first_line, printable
from engine.files import open_regular

# What may be fetched for an export, each only by the user's word, and the rest of what says where models are.
_FETCHED = (*PIPELINES, IMAGE_ENCODER, "tokenizer_name")
_REVISIONS = ("revision", "non_ema_revision")
_MODELS = (*_FETCHED, *_REVISIONS, "variant", "original_config", "cache_dir")
# What a configuration beside a checkpoint, which may be a stranger's, says of another machine: of no use to an export.
_PASSED_OVER = ("cache_dir", "compile_cache_dir", "logging_dir", "report_to", "push_to_hub", "hub_token", "hub_model_id")
USAGE = (
    "python -m engine.checkpoint info|verify|export DIR; DIR is a checkpoint, an output directory for its latest, or "
    "OUTPUT_DIR/best"
)


def _locate(directory: Path) -> Path:
    """A checkpoint: the directory itself, the latest within an output directory, or the `latest` or `best` that names it."""
    import engine.quiet  # noqa: F401  # isort: skip (before the libraries that it quiets)
    from engine.loop.checkpoints.layout import bring_back, find
    from engine.loop.checkpoints.names import BEST, LATEST, MANIFEST, step_of

    try:
        bring_back(directory if step_of(directory) < 0 else directory.parent)
        if (directory / MANIFEST).is_file():
            return directory
        if directory.name in (LATEST, BEST) and directory.is_file():
            found = find(directory.parent, directory.name)
        else:
            found = find(directory, LATEST) if directory.is_dir() else None
    except OSError as error:
        raise UserError(f"{directory}: {first_line(error)}; give a checkpoint, or an output directory with one") from None
    if found is None:
        raise UserError(f"{directory}: neither a checkpoint nor an output directory with one")
    return found


def info_command(arguments: list[str]) -> int:
    parser = Parser("engine.checkpoint info", description="Describe a checkpoint.")
    parser.add_argument("directory", type=Path)
    directory = _locate(parser.parse_args(arguments).directory)
    from engine.loop.checkpoints.layout import open_checked

    checkpoint = open_checked(directory)
    state, files = checkpoint.state, checkpoint.files
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"checkpoint     {directory} ({size / 2**20:.1f} MiB)")
    print(f"step           {state.step}")
    print(f"processes      {state.world}")
    for name, value in state.run:
        print(f"{name.replace('_', ' '):14} {printable(str(value))}")
    for kind in files.kinds:
        print(f"{kind:14} {files.elements(kind)} numbers")
    return 0


def verify_command(arguments: list[str]) -> int:
    parser = Parser(
        "engine.checkpoint verify", description="Compare every file of a checkpoint with its digest, and look at every value."
    )
    parser.add_argument("directory", type=Path)
    directory = _locate(parser.parse_args(arguments).directory)
    from engine.loop.checkpoints.layout import open_checked

    open_checked(directory, whole=True)
    print(f"{directory} is whole")
    return 0


def export_command(arguments: list[str]) -> int:
    parser = Parser("engine.checkpoint export", description="Write the diffusers pipeline of a checkpoint.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the pipeline goes")
    parser.add_argument("--config", type=Path, help="the run's config.toml (default: beside the checkpoint)")
    parser.add_argument(
        "--kind", choices=["ema", "weight"], help="which weights (default: the moving average, if there is one)"
    )
    for name in _MODELS:
        parser.add_argument(f"--{name}", help="as for engine.run, in place of what the configuration says")
    options = parser.parse_args(arguments)
    check_writable("--output_dir", options.output_dir)
    directory = _locate(options.directory)
    file, opened = (options.config, open_any) if options.config else (directory.parent / CONFIG, open_regular)
    if not os.path.lexists(file):
        raise UserError(f"{file}: no such file; name the run's config.toml with --config")
    values = read_toml(TrainConfig, file, str(file), opened)
    given = {name: value for name in _MODELS if (value := getattr(options, name)) is not None}
    config = load(TrainConfig, values | given, str(file))
    if not options.config:
        config = load(TrainConfig, _of_a_stranger(file, values, given) | given, str(file))
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.loop.checkpoints.layout import open_checked, or_another
    from engine.loop.checkpoints.models import whole_parameters
    from engine.loop.export import result_of, save_result
    from engine.models.family import open_family
    from engine.models.training_form import to_published_form

    quiet_libraries()
    checkpoint = open_checked(directory)
    files = checkpoint.files
    kind = options.kind or ("ema" if "ema" in files.kinds else "weight")
    if kind not in files.kinds:
        raise UserError(f"{directory}: holds no {kind}; it has {', '.join(files.kinds)}")
    family = open_family(config)
    family.check_files()
    # The parameters as training lays them out, without the rest of what a training pass needs, a GPU of some kind perhaps.
    model = family.published_model()
    family.adapters = checkpoint.state.layers
    family.check_adapters()
    family.lay_out(model)
    parameters = list(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters if parameter.requires_grad}
    frozen = {name: parameter.detach() for name, parameter in parameters if not parameter.requires_grad}
    whole = whole_parameters(files, kind, shapes, {} if config.trains_beside else {**frozen, **dict(model.named_buffers())})
    with or_another(directory):
        files.check_model(shapes)
        config = config.model_copy(update={"output_dir": str(options.output_dir)})
        save_result(config, family, model, to_published_form(model, whole))
    print(f"{kind} of step {checkpoint.state.step} in {result_of(config, family)[1]}")
    return 0


def _of_a_stranger(file: Path, values: dict[str, Any], given: dict[str, str]) -> dict[str, Any]:
    """What an export may take from a configuration that lies beside a checkpoint.

    Raises:
        UserError: by its word alone, something would be fetched that is not the family's own published model.
    """
    family = values.get("family")
    published = FAMILIES[family].published if isinstance(family, str) and family in FAMILIES else {}
    named = {name: value for name in _FETCHED if isinstance(value := given.get(name, values.get(name)), str)}
    elsewhere = {name: value for name, value in named.items() if not os.path.exists(os.path.expanduser(value))}  # noqa: PTH110, PTH111
    asked = {name: value for name, value in elsewhere.items() if name not in given and value != published.get(name)}
    if elsewhere:
        asked |= {name: values[name] for name in _REVISIONS if values.get(name) and name not in given}
    if asked:
        wanted = " ".join(f"--{name} {value}" for name, value in asked.items())
        raise UserError(f"{file}: what is not on this machine is fetched by your word alone; add {wanted}, or local folders")
    return {name: value for name, value in values.items() if name not in _PASSED_OVER}


COMMANDS = {"info": info_command, "verify": verify_command, "export": export_command}


def main() -> int:
    return choose(COMMANDS, USAGE)


if __name__ == "__main__":
    sys.exit(exit_code("engine.checkpoint", main))
