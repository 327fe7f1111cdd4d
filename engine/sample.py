"""Draws images from a trained pipeline into one labelled grid: `python -m engine.sample --model DIR --prompts ...`."""

import sys
from inspect import signature
from pathlib import Path

from engine.catalogue import FAMILIES
from engine.config.command_line import Parser
from engine.errors import UserError, exit_code


def main() -> int:
    parser = Parser("engine.sample", description="Draw images from a trained pipeline into one labelled grid.")
    parser.add_argument("--model", type=Path, required=True, help="directory of the trained pipeline")
    parser.add_argument(
        "--other_half",
        help="for Kandinsky and Wuerstchen, the decoder of a prior or the prior of a decoder (default: the published)",
    )
    parser.add_argument("--prompts", nargs="+", required=True, help="one row of images each")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="default: 4")
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's own")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's own")
    parser.add_argument("--resolution", type=int, help="height and width (default: the pipeline's own)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--compile", action="store_true", help="compile the denoising models with torch.compile")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the grid (default: samples.png)")
    options = parser.parse_args(sys.argv[1:])
    results = [options.model / family.result for family in FAMILIES.values() if family.result]
    model = next(filter(Path.is_dir, results), options.model)
    if not (model / "model_index.json").is_file():
        raise UserError(f"--model {options.model}: no model_index.json there; give the output directory of a training")

    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    import torch

    from engine.models.pipelines import compile_denoisers, draw, open_pipeline
    from engine.picture import labelled_grid, save_png

    quiet_libraries()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = open_pipeline(model, options.other_half, dtype).to(device)
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
    rows = list(draw(pipeline, options.prompts, options.images_per_prompt, options.seed, **given))
    save_png(labelled_grid(rows), options.output)
    print(f"samples in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("engine.sample", main))
