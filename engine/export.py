"""Writes a trained pipeline for other programs: `python -m engine.export --model DIR --single_file out.safetensors`."""

import sys
from pathlib import Path

from engine.config.checks import check_writable
from engine.config.command_line import Parser
from engine.errors import UserError, exit_code, printable

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main() -> int:
    parser = Parser(
        "engine.export", description="Write a trained Stable Diffusion into a single file, as web interfaces read it."
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of the trained pipeline")
    parser.add_argument("--single_file", type=Path, required=True, help="the file to write, .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: as they are)")
    options = parser.parse_args(sys.argv[1:])
    model, file = options.model, options.single_file
    if not (model / "model_index.json").is_file():
        raise UserError(
            f"--model {model}: no model_index.json there; give the output directory of a training. Of a checkpoint, "
            "or OUTPUT_DIR/best, `python -m engine.checkpoint export` writes one"
        )
    if file.suffix != ".safetensors" or not file.parent.is_dir():
        raise UserError(f"--single_file {file}: give a name that ends in .safetensors, in a directory that exists")
    check_writable("--single_file", file.parent)

    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    import torch
    from diffusers import StableDiffusionPipeline

    from engine.models.check import check_pipeline
    from engine.models.index import read_index
    from engine.models.original_layout import write_single_file

    quiet_libraries()
    found = read_index(model)["_class_name"]
    if found != "StableDiffusionPipeline":
        raise UserError(f"--model {model}: a {found}; only Stable Diffusion 1.x and 2.x are read from single files")
    check_pipeline(model, StableDiffusionPipeline)
    write_single_file(model, file, getattr(torch, DTYPES[options.dtype]) if options.dtype else None)
    print(f"{printable(str(file))}: {file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("engine.export", main))
