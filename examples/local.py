"""One of the other families from nothing to an image in under two minutes on a CPU: `python -m examples.local wuerstchen`.

The photographs of scikit-image and scikit-learn become an image folder; tiny pipelines of the real architecture are built from
configurations; `python -m engine.run` trains one half exactly as a user would; and plain diffusers puts the result together
with the other half, as its documentation shows, and draws. With random frozen parts the picture shows nothing: what this shows
is that every step works, and how it is done.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

from engine.catalogue import FAMILIES
from engine.picture import labelled_grid, save_png
from engine.quiet import quiet_libraries
from examples.photographs import CAPTIONS, write_images
from examples.tiny_models import WRITERS

RESOLUTION = {"kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}
PROMPTS = [CAPTIONS["chelsea"], CAPTIONS["rocket"]]


def train(family: str, models: dict[str, str], images: Path, output: Path, steps: int) -> None:
    """What a user runs."""
    command = [
        sys.executable, "-m", "engine.run", "--family", family, *(f"--{name}={value}" for name, value in models.items()),
        "--train_data_dir", str(images), "--output_dir", str(output), "--resolution", str(RESOLUTION[family]),
        "--train_batch_size", "8", "--max_train_steps", str(steps), "--learning_rate", "1e-3", "--lr_warmup_steps", "0",
        "--use_ema", "--seed", "0", "--validation_prompts", *PROMPTS, "--validation_epochs", "50",
    ]  # fmt: skip
    print("$", " ".join(f'"{word}"' if " " in word else word for word in ["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True)


def draw(family: str, models: dict[str, str], output: Path) -> list:
    """Images of the prompts by plain diffusers: the decoder, with the parts of the prior as `prior_*` components."""
    prior = decoder = output
    if family == "kandinsky-decoder":
        prior = Path(models["pretrained_prior_model_name_or_path"])
    else:
        decoder = Path(models["pretrained_decoder_model_name_or_path"])
        prior = output / FAMILIES[family].result
    prior_pipeline = DiffusionPipeline.from_pretrained(prior)
    prior_components = {f"prior_{name}": part for name, part in prior_pipeline.components.items()}
    pipeline = AutoPipelineForText2Image.from_pretrained(decoder, **prior_components)
    pipeline.set_progress_bar_config(disable=True)
    size, generator = RESOLUTION[family], torch.Generator().manual_seed(0)
    return [
        pipeline(prompt, height=size, width=size, num_images_per_prompt=2, num_inference_steps=10, generator=generator).images
        for prompt in PROMPTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny model of a family on photographs, on the CPU.")
    parser.add_argument("family", choices=sorted(RESOLUTION))
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--directory", type=Path, help="default: build/FAMILY")
    options = parser.parse_args()
    quiet_libraries()
    root = options.directory or Path("build") / options.family
    shutil.rmtree(root, ignore_errors=True)
    images = write_images(root / "images")
    models = WRITERS[options.family](root / "models")
    output = root / "trained"
    train(options.family, models, images, output, options.steps)
    drawn = draw(options.family, models, output)
    save_png(labelled_grid(list(zip(PROMPTS, drawn, strict=True))), root / "grid.png")
    print(f"""
pipeline  {output / FAMILIES[options.family].result}
grid      {root / "grid.png"}
samples   {output / "samples"}
curves    {output / "curves.png"}""")


if __name__ == "__main__":
    main()
