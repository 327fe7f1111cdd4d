"""Draws images from a trained pipeline into one labelled grid: `python -m engine.sample --model DIR --prompts ...`."""

import sys
from inspect import signature
from pathlib import Path
from typing import Any

from engine.catalogue import FAMILIES
from engine.config.checks import check_picture
from engine.config.command_line import Parser, number, prompt, whole
from engine.errors import UserError, exit_code, first_line, out_of_memory, printable
from engine.loop.checkpoints.names import LATEST, MANIFEST


def _pixel_step(pipeline: Any) -> int:
    """In steps of how many pixels a pipeline draws."""
    if "vqgan" in pipeline.components:
        return 128  # Wuerstchen's three stages have whole sizes together
    if "movq" in pipeline.components:
        return int(4 ** (len(pipeline.movq.config.block_out_channels) - 1))  # Kandinsky, which would round up
    return 8


def _check_sampling(pipeline: Any, resolution: int | None, steps: int | None) -> None:
    """Refuses what a pipeline would refuse in a trace, or answer with an image of another size."""
    step = _pixel_step(pipeline)
    if resolution is not None and resolution % step:
        nearest = max(round(resolution / step), 1) * step
        raise UserError(f"--resolution {resolution}: this model draws images in steps of {step} px; the nearest is {nearest}")
    most = pipeline.scheduler.config.get("num_train_timesteps")
    if steps is not None and type(most) is int and steps > most:
        raise UserError(f"--num_inference_steps {steps}: this model has {most} timesteps")


def _command_line() -> Parser:
    parser = Parser("engine.sample", description="Draw images from a trained pipeline into one labelled grid.")
    parser.add_argument("--model", type=Path, required=True, help="directory of the trained pipeline")
    parser.add_argument(
        "--other_half",
        help="for Kandinsky and Wuerstchen, the decoder of a prior or the prior of a decoder (default: the published)",
    )
    parser.add_argument("--prompts", type=prompt, nargs="+", required=True, help="one row of images each")
    parser.add_argument("--images_per_prompt", type=whole(1, 1024), default=4, help="default: 4")
    parser.add_argument("--num_inference_steps", type=whole(1), help="default: the pipeline's own")
    parser.add_argument("--guidance_scale", type=number(0), help="default: the pipeline's own")
    parser.add_argument("--resolution", type=whole(8), help="height and width (default: the pipeline's own)")
    parser.add_argument("--seed", type=whole(-(2**63), 2**63 - 1), default=0, help="default: 0")
    parser.add_argument("--compile", action="store_true", help="compile the denoising models with torch.compile")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the grid (default: samples.png)")
    return parser


def _locate(directory: Path) -> Path:
    """The pipeline that a training left in its output directory, or that lies in one."""
    results = [directory / family.result for family in FAMILIES.values() if family.result]
    model = next(filter(Path.is_dir, results), directory)
    if not (model / "model_index.json").is_file():
        remedy = "give the output directory of a training that ended"
        if any((directory / name).exists() for name in (LATEST, MANIFEST)):
            remedy = "make a pipeline of the checkpoint with `python -m engine.checkpoint export`"
        problem = "no model_index.json there" if directory.is_dir() else "no such directory"
        raise UserError(f"--model {directory}: {problem}; {remedy}")
    return model


def main() -> int:
    options = _command_line().parse_args(sys.argv[1:])
    check_picture("--output", options.output)
    model = _locate(options.model)

    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    import torch

    from engine.models.pipelines import compile_denoisers, draw, open_pipeline, require_drawable
    from engine.picture import labelled_grid, save_png

    quiet_libraries()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = open_pipeline(model, options.other_half, dtype)
    _check_sampling(pipeline, options.resolution, options.num_inference_steps)
    if options.resolution is None:
        require_drawable(pipeline, model, "give --resolution")
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=None)
    # Wuerstchen is guided in its prior alone.
    guided = "guidance_scale" if "guidance_scale" in signature(pipeline.__call__).parameters else "prior_guidance_scale"
    arguments = {
        "num_inference_steps": options.num_inference_steps,
        guided: options.guidance_scale,
        "height": options.resolution,
        "width": options.resolution,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    if options.compile:
        compile_denoisers(pipeline)
    try:
        rows = list(draw(pipeline, options.prompts, options.images_per_prompt, options.seed, **given))
    except Exception as error:  # numbers in a model's configurations that no other check knows
        if out_of_memory(error):
            raise
        raise UserError(f"--model {model}: cannot be drawn with: {type(error).__name__}: {first_line(error)}") from None
    save_png(labelled_grid(rows), options.output)
    print(f"samples in {printable(str(options.output))}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("engine.sample", main))
