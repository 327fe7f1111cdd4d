"""The real photographs that scikit-image and scikit-learn ship, as an image folder to train on."""

import json
from pathlib import Path

from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

# Captions of at most 14 letters, which is what the tiny tokenizer of `tiny_models` has room for.
CAPTIONS = {
    "astronaut": "an astronaut", "brick": "a brick wall", "camera": "a photographer", "chelsea": "a cat", "coffee": "a coffee",
    "coins": "coins", "grass": "grass", "gravel": "gravel", "hubble_deep_field": "galaxies", "moon": "the moon",
    "retina": "a retina", "rocket": "a rocket", "china.jpg": "a temple", "flower.jpg": "a flower",
}  # fmt: skip


def photographs() -> dict[str, Image.Image]:
    """Caption -> photograph, in RGB and of many sizes."""
    images = {}
    for name, caption in CAPTIONS.items():
        pixels = load_sample_image(name) if name.endswith(".jpg") else getattr(data, name)()
        images[caption] = Image.fromarray(pixels).convert("RGB")
    return images


def write_images(directory: Path, longest: int = 512) -> Path:
    """Saves the photographs as JPEG files with a metadata.jsonl; the larger ones are shrunk first."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (caption, image) in enumerate(photographs().items()):
        name = f"{number:02d}.jpg"
        image.thumbnail((longest, longest))
        image.save(directory / name, quality=95)
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (directory / "metadata.jsonl").write_text("".join(lines))
    return directory
