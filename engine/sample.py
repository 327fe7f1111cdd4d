"""Draws images from a trained pipeline, each with its settings, and all in one labelled grid:
`python -m engine.sample --model DIR --prompts ...`."""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from engine.config.checks import check_picture
from engine.config.command_line import Parser, number, prompt, whole
from engine.drawable import Drawable, call, compared, locate, told_apart
from engine.errors import UserError, exit_code, first_line, out_of_memory, printable
from engine.messages import Progress, busy, say
from engine.prompts import GUIDANCE, IMAGES, SEED, STEPS, Wanted, read_prompts, size

PRECISIONS = ("fp32", "bf16", "fp16")
_MOST_SHOWN = 1024  # images in a picture of all
_OF_THE_PRIOR = ("prior_num_inference_steps", "prior_guidance_scale")


def _pixel_step(pipeline: Any) -> int:
    """In steps of how many pixels a pipeline draws."""
    if "vqgan" in pipeline.components:
        return 128  # Wuerstchen's three stages have whole sizes together
    if "movq" in pipeline.components:
        return int(4 ** (len(pipeline.movq.config.block_out_channels) - 1))  # Kandinsky, which would round up
    return 8


def _check_sampling(pipeline: Any, wanted: Sequence[Wanted]) -> None:
    """Refuses what a pipeline would refuse in a trace, or answer with an image of another size."""
    step, most = _pixel_step(pipeline), pipeline.scheduler.config.get("num_train_timesteps")
    for width, height in dict.fromkeys((one.width, one.height) for one in wanted):
        sides = [side for side in (width, height) if side is not None]
        wrong = next((side for side in sides if side % step), None)
        if wrong:
            named = sides[0] if len(set(sides)) == 1 else "x".join(map(str, sides))
            nearest = max(round(wrong / step), 1) * step
            raise UserError(f"--resolution {named}: this model draws images in steps of {step} px; the nearest is {nearest}")
    for steps in dict.fromkeys(one.steps for one in wanted):
        if steps is not None and type(most) is int and steps > most:
            raise UserError(f"--num_inference_steps {steps}: this model has {most} timesteps")


def _scaled(text: str) -> tuple[Path, float]:
    """A path, and the scale that may stand behind it."""
    path, _, scale = text.rpartition(":")
    try:
        if path and not Path(text).exists() and math.isfinite(value := float(scale)):
            return Path(path), value
    except ValueError:
        pass
    return Path(text), 1.0


def _command_line() -> Parser:
    parser = Parser("engine.sample", description="Draw images from a trained pipeline: each, and all in one labelled grid.")
    parser.add_argument(
        "--model", type=Path, help="the trained pipeline, the output directory of its training, or a checkpoint in it"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="draw with several models from the same noise, side by side and as a GIF: pipelines, output directories, "
        "checkpoints, or adapters over --model; or with all checkpoints of the one output directory named",
    )
    parser.add_argument(
        "--lora",
        type=_scaled,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:SCALE]",
        help="adapters to draw with",
    )
    parser.add_argument(
        "--other_half",
        help="for Kandinsky and Wuerstchen, the decoder of a prior or the prior of a decoder (default: the published)",
    )
    parser.add_argument(
        "--prompts", type=prompt, nargs="+", required=True, metavar="PROMPT|FILE",
        help="one row of images each; a .txt file holds one a line (with kohya's --n --d --w --h --s --l behind it), a .jsonl "
        "file objects with prompt, negative_prompt, seed, size, steps, guidance_scale, images",
    )  # fmt: skip
    parser.add_argument("--negative_prompt", type=prompt, help="what guidance leads away from")
    parser.add_argument("--images_per_prompt", type=IMAGES, default=4, help="default: 4")
    parser.add_argument(
        "--batch_size", type=whole(1, 1024), default=4, help="images at a time, the same for any number (default: 4)"
    )
    parser.add_argument("--num_inference_steps", type=STEPS, help="default: the pipeline's own")
    parser.add_argument("--guidance_scale", type=GUIDANCE, help="default: the pipeline's own")
    parser.add_argument("--prior_num_inference_steps", type=STEPS, help="of Kandinsky's and Wuerstchen's first stage")
    parser.add_argument("--prior_guidance_scale", type=number(0), help="of Kandinsky's first stage")
    parser.add_argument(
        "--scheduler", help="ddim, euler, euler_a, dpm++_2m, `dpm++ 2m karras`, unipc, lcm, ... (default: the pipeline's own)"
    )
    parser.add_argument("--resolution", type=size, help="height and width, or WIDTHxHEIGHT (default: the pipeline's own)")
    parser.add_argument("--seed", type=SEED, default=0, help="of the first image of a prompt, then one more each (default: 0)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--compile", action="store_true", help="compile the models with torch.compile: for many images")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the grid, beside which the images go as "
                        "NAME-0000.png (default: samples.png)")  # fmt: skip
    return parser


def _device(name: str | None) -> Any:
    """The device of a name, which computes.

    Raises:
        UserError: there is none.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.zeros(1, device=device).add(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's builds differ in what they raise
        raise UserError(f"--device {name}: {first_line(error)}; give cpu, cuda or cuda:NUMBER") from None
    return device


def _arguments_of(pipeline: Any, options: Any) -> dict[str, Any]:
    """What holds for all images, as the pipeline takes it."""
    takes = signature(pipeline.__call__).parameters
    given = {name: value for name in _OF_THE_PRIOR if (value := getattr(options, name)) is not None}
    for name in given:
        if name not in takes:
            raise UserError(f"--{name}: this model has no prior; leave it out")
    if "guidance_scale" not in takes and "prior_guidance_scale" in given and options.guidance_scale is not None:
        raise UserError("--prior_guidance_scale: this model is guided in its prior alone; leave out --guidance_scale")
    return given


def _settings(pipeline: Any, one: Wanted, image: Any, arguments: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that made an image."""
    from engine.models.schedulers import title_of

    usual = {name: parameter.default for name, parameter in signature(pipeline.__call__).parameters.items()} | arguments
    guidance = one.guidance_scale
    if guidance is None:
        guidance = usual.get("guidance_scale", usual.get("prior_guidance_scale"))
    sampler, spacing = title_of(pipeline)
    return {
        "prompt": one.prompt, "negative_prompt": one.negative_prompt or "", "seed": one.seed, "width": image.width,
        "height": image.height, "steps": one.steps or usual["num_inference_steps"], "guidance_scale": guidance,
        "scheduler": sampler, "spacing": spacing, **arguments, **about,
    }  # fmt: skip


def _texts(settings: dict[str, Any]) -> dict[str, str]:
    """What a PNG says of how it was made: as the web interfaces read it, and as JSON."""
    words = {
        "Steps": settings["steps"], "Sampler": settings["scheduler"], "Schedule type": (settings["spacing"] or "").capitalize(),
        "CFG scale": settings["guidance_scale"], "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}", "Model": json.dumps(settings["model"])[1:-1],
    }  # fmt: skip
    names = told_apart([call(Path(path)) for path, _ in settings["lora"]], [Path(path) for path, _ in settings["lora"]])
    named = [f" <lora:{name}:{scale:g}>" for name, (_, scale) in zip(names, settings["lora"], strict=True)]
    lines = [settings["prompt"] + "".join(named)]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in words.items() if value != ""))
    return {"parameters": "\n".join(lines), "settings": json.dumps(settings, ensure_ascii=False)}


def _open(one: Drawable, options: Any, wanted: Sequence[Wanted], device: Any, precision: str) -> Any:
    """The pipeline to draw with, ready on its device."""
    import torch

    from engine.models.drawing import compile_models, speed_up
    from engine.models.pipelines import bake_in, open_pipeline, require_drawable
    from engine.models.schedulers import use_scheduler

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    adapters = [*one.adapters, *options.lora]
    # An adapter changes less than a number in 16 bits can hold: it is added in fp32, and the sum rounded once.
    pipeline = open_pipeline(one.pipeline, options.other_half, torch.float32 if adapters else dtype, one.parts)
    for path, scale in adapters:
        bake_in(pipeline, path, scale)
    if options.scheduler:
        use_scheduler(pipeline, options.scheduler)
    _check_sampling(pipeline, wanted)
    if any(image.width is None or image.height is None for image in wanted):
        require_drawable(pipeline, one.pipeline, "give --resolution")
    pipeline = pipeline.to(device, dtype)
    pipeline.set_progress_bar_config(disable=None, leave=False)
    speed_up(pipeline)
    if options.compile:
        compile_models(pipeline, 2 * len({(image.width, image.height) for image in wanted}))
    return pipeline


def _draw(one: Drawable, options: Any, wanted: Sequence[Wanted], device: Any, names: Sequence[Path], shown: int) -> list[Any]:
    """Saves the images that are wanted, each under its name with its settings; returns so many of the first, in their order."""
    from engine.models.drawing import draw
    from engine.picture import save_png

    precision = options.precision or ("fp32" if device.type == "cpu" else "bf16")
    with busy(f"Opening {one.name}"):
        pipeline = _open(one, options, wanted, device, precision)
    arguments = _arguments_of(pipeline, options)
    about = {
        "model": one.name, "pipeline": str(one.pipeline), "other_half": options.other_half,
        "parts": {part: str(folder) for part, folder in one.parts.items()},
        "lora": [(str(path), scale) for path, scale in (*one.adapters, *options.lora)], "precision": precision,
    }  # fmt: skip
    images: dict[int, Any] = {}  # those that pictures of all show
    try:
        with Progress(len(wanted), f"Drawing with {one.name}", "image") as progress:
            for place, image in draw(pipeline, wanted, options.batch_size, options.compile, **arguments):
                save_png(image, names[place], _texts(_settings(pipeline, wanted[place], image, arguments, about)))
                if place < shown:
                    images[place] = image
                progress.update()
    except UserError:
        raise
    except Exception as error:  # numbers in a model's configurations that no other check knows
        if out_of_memory(error) or isinstance(error, OSError):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--model {one.pipeline}: cannot be drawn with: {said}") from None
    return [images[place] for place in range(shown)]


def _by_prompt(rows: Sequence[Sequence[Wanted]], images: Sequence[Any]) -> list[tuple[str, Sequence[Any]]]:
    """Each prompt with its images."""
    left = iter(images)
    return [(row[0].prompt, [next(left) for _ in row]) for row in rows]


def _sides(options: Any) -> list[Drawable]:
    """What is drawn with, one after another.

    Raises:
        UserError: nothing is named, or something that cannot be drawn with.
    """
    if options.model is None and not options.compare:
        raise UserError("--model is required: the directory of a trained pipeline; or --compare, with two of them")
    base = locate("--model", options.model) if options.model is not None else None
    if not options.compare:
        return [base] if base else []
    if base is not None and (base.parts or base.adapters):
        raise UserError(f"--model {options.model}: beneath what --compare names lies a whole pipeline; give one")
    return compared(options.compare, base.pipeline if base else None)


def _shown(rows: list[list[Wanted]], sides: int) -> list[list[Wanted]]:
    """The first rows, of which one picture can show all images, and memory hold them."""
    ends = itertools.accumulate(len(row) for row in rows)
    fitting = max(1, sum(end * sides <= _MOST_SHOWN for end in ends))
    if fitting < len(rows):
        say(f"Pictures of all show the first {fitting} of {len(rows)} prompts; every image is saved beside them")
    return rows[:fitting]


def main() -> int:
    options = _command_line().parse_args(sys.argv[1:])
    output: Path = options.output
    check_picture("--output", output)
    width, height = options.resolution or (None, None)
    usual = Wanted(
        "", options.seed, options.negative_prompt, width, height, options.num_inference_steps, options.guidance_scale
    )
    rows = read_prompts(options.prompts, usual, options.images_per_prompt)
    wanted = [one for row in rows for one in row]
    sides = _sides(options)

    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.picture import labelled_grid, save_fading, save_png, side_by_side

    quiet_libraries()
    device = _device(options.device)
    digits = max(4, len(str(len(wanted) - 1)))
    rows = _shown(rows, len(sides))
    drawn = []
    for place, side in enumerate(sides):
        stem = f"{output.stem}-{place}" if options.compare else output.stem
        names = [output.with_name(f"{stem}-{image:0{digits}}.png") for image in range(len(wanted))]
        drawn.append(_draw(side, options, wanted, device, names, sum(map(len, rows))))
    if not options.compare:
        save_png(labelled_grid(_by_prompt(rows, drawn[0])), output)
        print(f"samples in {printable(str(output))}")
        return 0
    save_png(side_by_side([side.name for side in sides], _by_prompt(rows, list(zip(*drawn, strict=True)))), output)
    grids = (
        labelled_grid([(f"{side.name}: {prompt}", row) for prompt, row in _by_prompt(rows, images)])
        for side, images in zip(sides, drawn, strict=True)
    )
    fading = output.with_suffix(".gif")
    save_fading(grids, fading)
    print(f"side by side in {printable(str(output))}, fading in {printable(str(fading))}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("engine.sample", main))
