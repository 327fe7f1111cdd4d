"""The tiny Stable Diffusion pipeline, and an image folder to train it on."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from examples.tiny_models import write_stable_diffusion

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def write_pipeline(directory: Path, seed: int = 0, **scheduler) -> Path:
    return Path(write_stable_diffusion(directory, seed, **scheduler)["pretrained_model_name_or_path"])


def write_images(directory: Path, count: int = 12, size: tuple[int, int] = (16, 16)) -> Path:
    """Coloured noise with captions; the colours repeat, so that captions do too."""
    generator = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name, color = list(COLORS.items())[number % len(COLORS)]
        pixels = np.clip(np.array(color) + generator.normal(0, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f"{number:03d}.png")
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"a {name} square"}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return directory
