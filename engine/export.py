"""Writes what was trained for other programs: a single file, an adapter baked in or taken out, or an adapter in another form.

`python -m engine.export --model DIR` with one of `--single_file FILE`, `--merge ADAPTER`, `--extract`, `--lora ADAPTER`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from engine.catalogue import INDEX
from engine.config.checks import check_writable
from engine.config.command_line import Parser, number, whole
from engine.errors import UserError, exit_code, printable

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# What is asked for -> which options are of it; the first must be given.
TASKS = {
    "single_file": ("dtype",),
    "merge": ("output", "scale", "dtype", "variant"),
    "extract": ("output", "base", "rank", "save_format", "dtype", "variant"),
    "lora": ("output", "save_format", "dtype", "variant"),
}


def _parser() -> Parser:
    parser = Parser("engine.export", description="Write a trained model or adapter for other programs.")
    parser.add_argument("--model", type=Path, required=True, help="directory of the pipeline; with --lora, which it is of")
    parser.add_argument("--single_file", type=Path, help="a Stable Diffusion as web interfaces read it: the file, .safetensors")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="ADAPTER", help="bake LoRA files into the pipeline")
    parser.add_argument("--extract", action="store_true", default=None, help="a LoRA of what --model has learned since --base")
    parser.add_argument("--lora", type=Path, metavar="ADAPTER", help="a LoRA, to be written in another form")
    parser.add_argument("--output", type=Path, help="what to write: a directory with --merge and for PEFT, else a .safetensors")
    parser.add_argument("--scale", type=number(-100), nargs="+", help="how much of each adapter is baked in (default: 1)")
    parser.add_argument("--base", type=Path, help="directory of the pipeline that --model was tuned from")
    parser.add_argument("--rank", type=whole(1), help="of the LoRA to extract (default: 16)")
    parser.add_argument("--save_format", choices=["diffusers", "kohya", "peft"], help="of the LoRA (default: diffusers)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: as they are)")
    parser.add_argument("--variant", help="of the pipeline's weights, such as fp16")
    return parser


def _task(options: argparse.Namespace) -> str:
    """The one thing that is asked for, once all that is given is of it."""
    asked = [task for task in TASKS if getattr(options, task) is not None]
    if len(asked) != 1:
        raise UserError("give one of " + ", ".join(f"--{task}" for task in TASKS) + "; one thing is written at a time")
    task = asked[0]
    others = {name for names in TASKS.values() for name in names} - {*TASKS[task]}
    if wrong := sorted(name for name in others if getattr(options, name) is not None):
        raise UserError(f"--{wrong[0]} says nothing to --{task}; leave it out")
    if "output" in TASKS[task] and options.output is None:
        raise UserError(f"--{task}: say with --output what to write")
    return task


def main() -> int:
    options = _parser().parse_args(sys.argv[1:])
    task = _task(options)
    for name in ("model", "base"):
        folder = getattr(options, name)
        if folder is not None and not (folder / INDEX).is_file():
            raise UserError(
                f"--{name} {folder}: no {INDEX} there; give the output directory of a training. Of a checkpoint, "
                "or OUTPUT_DIR/best, `python -m engine.checkpoint export` writes one"
            )
    target = options.single_file if task == "single_file" else options.output
    _check_target("--single_file" if task == "single_file" else "--output", target, _is_folder(task, options))

    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    import torch

    quiet_libraries()
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    {"single_file": _single_file, "merge": _merge, "extract": _extract, "lora": _convert}[task](options, dtype)
    written = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    print(f"{printable(str(target))}: {sum(path.stat().st_size for path in written) / 2**20:.1f} MiB")
    return 0


def _is_folder(task: str, options: argparse.Namespace) -> bool:
    return task == "merge" or options.save_format == "peft"


def _check_target(flag: str, target: Path, folder: bool) -> None:
    if folder and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        raise UserError(f"{flag} {target}: is there already; name a directory that is not, or an empty one")
    if not folder and (target.suffix != ".safetensors" or not target.parent.is_dir()):
        raise UserError(f"{flag} {target}: give a name that ends in .safetensors, in a directory that exists")
    check_writable(flag, target if folder else target.parent)


def _single_file(options: argparse.Namespace, dtype: Any) -> None:
    from diffusers import StableDiffusionPipeline

    from engine.models.check import check_pipeline
    from engine.models.index import read_index
    from engine.models.original_layout import write_single_file

    found = read_index(options.model)["_class_name"]
    if found != "StableDiffusionPipeline":
        raise UserError(f"--model {options.model}: a {found}; only Stable Diffusion 1.x and 2.x are read from single files")
    check_pipeline(options.model, StableDiffusionPipeline)
    write_single_file(options.model, options.single_file, dtype)


def _merge(options: argparse.Namespace, dtype: Any) -> None:
    from engine.models.adapter import read_adapter
    from engine.models.low_rank import merge, open_parts

    scales = options.scale or [1.0]
    if len(scales) not in (1, len(options.merge)):
        raise UserError(f"--scale: {len(scales)} of them for {len(options.merge)} adapters; give one, or one for each")
    parts = open_parts(options.model, options.variant)
    adapters = [read_adapter(path, parts, of_inputs=True) for path in options.merge]
    scales = scales * len(adapters) if len(scales) == 1 else scales
    merge(options.model, list(zip(adapters, scales, strict=True)), options.output, options.variant, dtype)


def _extract(options: argparse.Namespace, dtype: Any) -> None:
    from engine.models.low_rank import extract

    if options.base is None:
        raise UserError("--extract: name with --base the pipeline that --model was tuned from")
    _write(extract(options.model, options.base, options.rank or 16, options.variant), options, dtype, options.base)


def _convert(options: argparse.Namespace, dtype: Any) -> None:
    from engine.models.adapter import read_adapter
    from engine.models.low_rank import open_parts

    adapter = read_adapter(options.lora, open_parts(options.model, options.variant), of_inputs=True)
    _write(adapter, options, dtype, options.model)


def _write(adapter: Any, options: argparse.Namespace, dtype: Any, base: Path) -> None:
    from engine.models.adapter import write_adapter

    write_adapter(options.output, adapter.to(dtype), options.save_format or "diffusers", {"ss_sd_model_name": base.name})


if __name__ == "__main__":
    sys.exit(exit_code("engine.export", main))
