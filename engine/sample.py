"""Draws images from a trained pipeline into one labelled grid: `python -m engine.sample --model DIR --prompts ...`."""

import sys
from pathlib import Path

from engine.config import Parser
from engine.errors import UserError, exit_code


def main() -> int:
    parser = Parser("engine.sample", description="Draw images from a trained pipeline into one labelled grid.")
    parser.add_argument("--model", type=Path, required=True, help="directory of the pipeline")
    parser.add_argument("--prompts", nargs="+", required=True, help="one row of images each")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="default: 4")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="default: 50")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="default: 7.5")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the grid (default: samples.png)")
    options = parser.parse_args(sys.argv[1:])
    if not (options.model / "model_index.json").is_file():
        raise UserError(f"--model {options.model}: no model_index.json there; give the output directory of a training")

    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    import torch
    from diffusers import DiffusionPipeline

    from engine.picture import labelled_grid, save_png

    quiet_libraries()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=None)
    rows = []
    for prompt in options.prompts:
        images = pipeline(
            prompt,
            num_images_per_prompt=options.images_per_prompt,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator(device).manual_seed(options.seed),
        ).images
        rows.append((prompt, images))
    save_png(labelled_grid(rows), options.output)
    print(f"samples in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("engine.sample", main))
