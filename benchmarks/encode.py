"""How fast does each family encode into latent shards? `python -m benchmarks.encode [--tiny] [--images 8] [--batch 4]`

Photographs are prepared in one thread and encoded, with their captions, by the frozen models of the published size (random
weights), as `engine.data.build` does it. On a GPU the encoders run in bf16, on a CPU in fp32. `--tiny` takes the few thousand
weights of `examples.tiny_models` instead, to try the benchmark itself.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import safetensors.torch
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from benchmarks import published
from benchmarks.environment import environment
from engine.config import TrainConfig
from engine.files import write_json
from engine.models.efficientnet import EfficientNetEncoder
from engine.models.family import Family, open_family
from engine.quiet import quiet_libraries
from examples import tiny_models
from examples.photographs import photographs

CHECKPOINTS = ["SD 1.5, 512 px", "Kandinsky 2.2 prior", "Kandinsky 2.2 decoder, 768 px", "Wuerstchen v2 prior, 768 px"]
TINY = {"kandinsky-prior": 32, "kandinsky-decoder": 32, "wuerstchen": 128}
REPEATS = 3


def write_encoders(checkpoint: str, config: TrainConfig) -> TrainConfig:
    """Saves random weights in bf16 for the frozen parts, beside the configurations of `published.write`."""
    family, _, pipelines = published.CHECKPOINTS[checkpoint]
    text_class = CLIPTextModelWithProjection if family.startswith("kandinsky") else CLIPTextModel
    build: dict[str, Callable[[Any], Any]] = {
        "image_encoder": CLIPVisionModelWithProjection, "text_encoder": text_class, "vae": lambda part: part,
        "movq": lambda part: part,
    }  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        for pipeline, parts in pipelines.items():
            option = "pretrained_model_name_or_path" if pipeline == "model" else f"pretrained_{pipeline}_model_name_or_path"
            folder = Path(getattr(config, option))
            for part in parts.keys() & build.keys():
                if family == "kandinsky-decoder" and part == "text_encoder":
                    continue
                build[part](parts[part]()).save_pretrained(folder / part)
    finally:
        torch.set_default_dtype(torch.float32)
    if family == "kandinsky-prior":
        statistics_of_prior = {"clip_mean": torch.zeros(1, 1280), "clip_std": torch.ones(1, 1280)}
        path = Path(config.pretrained_prior_model_name_or_path) / "prior" / "diffusion_pytorch_model.safetensors"
        safetensors.torch.save_file(statistics_of_prior, path)
    if family == "wuerstchen":
        path = Path(config.pretrained_prior_model_name_or_path).parent / "efficientnet.safetensors"
        safetensors.torch.save_file(EfficientNetEncoder().state_dict(), path)
        config = config.model_copy(update={"pretrained_image_encoder_name_or_path": str(path)})
    return config


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median time of `work`, after one run to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure(family: Family, name: str, images: int, batch: int, device: torch.device) -> dict[str, Any]:
    pictures = list(photographs().items())[:images]
    family.load_encoders(device)
    prepared = [family.prepare(image, 0)[0] for _, image in pictures]
    stacked = {key: torch.stack([item[key] for item in prepared[:batch]]) for key in prepared[0]}
    captions = [caption for caption, _ in pictures][:batch]
    row: dict[str, Any] = {
        "model": name,
        "prepared_per_second": len(pictures) / seconds(lambda: [family.prepare(image, 0) for _, image in pictures], device),
        "images_per_second": len(prepared[:batch]) / seconds(lambda: family.encode_images(stacked), device),
    }
    if family.captioned:
        row["captions_per_second"] = len(captions) / seconds(lambda: family.encode_captions(captions), device)
    row["bytes_per_sample"] = sum(field.row_bytes for field in family.record_spec.values())
    family.free_encoders()
    return row


def open_checkpoint(checkpoint: str, directory: Path, precision: str) -> Family:
    return open_family(write_encoders(checkpoint, published.write(checkpoint, directory, mixed_precision=precision)))


def open_tiny(name: str, directory: Path) -> Family:
    models = tiny_models.WRITERS[name](directory)
    return open_family(TrainConfig.model_validate({"family": name, "resolution": TINY[name], "shards_dir": "unused", **models}))


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.encode", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead of the published size")
    parser.add_argument("--images", type=int, default=8, help="photographs to prepare (default: 8)")
    parser.add_argument("--batch", type=int, default=4, help="images and captions encoded together (default: 4)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "no"
    rows = []
    for name in tqdm(list(TINY) if options.tiny else CHECKPOINTS, disable=None):
        with tempfile.TemporaryDirectory() as directory:
            opened = open_tiny(name, Path(directory)) if options.tiny else open_checkpoint(name, Path(directory), precision)
            rows.append(measure(opened, name, options.images, options.batch, device))
    print(f"{'model':32}{'prepared/s':>12}{'images/s':>12}{'captions/s':>12}{'KiB/sample':>12}")
    for row in rows:
        captions = f"{row['captions_per_second']:.3g}" if "captions_per_second" in row else "-"
        print(f"{row['model']:32}{row['prepared_per_second']:>12.3g}{row['images_per_second']:>12.3g}{captions:>12}"
              f"{row['bytes_per_sample'] / 2**10:>12.1f}")  # fmt: skip
    if options.json:
        write_json(options.json, {
            "question": __doc__.splitlines()[0], **environment(), "precision": precision, "batch": options.batch, "rows": rows,
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
