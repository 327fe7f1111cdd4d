"""What do buckets spare the photographs of scikit-image and scikit-learn? `python -m benchmarks.data.buckets [--json FILE]`

Each photograph is brought to a bucket of 512 px as `--buckets` does it, and to a square as without; which share of its area
each way crops away is given, and drawn (`--picture FILE.png`): the bucket's crop, and the square beside it.

What it costs: copies of the photographs are encoded by a Stable Diffusion of a few thousand weights, and trained on, at 64 px
in steps of 16, with buckets and without, in turns; samples per second are the medians, ratios are of one run. Images in buckets
have fewer pixels on average, and their share is given too.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import numpy as np
from PIL import Image

from benchmarks.tools.question import command_line
from benchmarks.tools.rows import write_result
from engine import messages
from engine.config.options import TrainConfig
from engine.data.format.buckets import Size, read_indexes, size_named
from engine.data.parts import build_parts
from engine.data.sizes import cropped_away, made, nearest
from engine.data.transforms import crop_centre, resize_to_cover
from engine.loop.trainer import train
from engine.models.encoder import open_encoding
from engine.picture import labelled_grid, save_png
from engine.processes import Processes
from engine.quiet import quiet_libraries
from examples.photographs import photographs, write_images
from examples.tiny_models import write_stable_diffusion

SIDE, STEP, MAX_RATIO = 512, 64, 4.0
HEIGHT, COLORS = 84, 96  # of the picture's photographs, pixels, and of the picture
COPIES, TURNS, STEPS, WARM = 8, 3, 60, 20


def compare() -> list[dict[str, Any]]:
    """Of each photograph the bucket, and the share of it that is cropped away there and by a square."""
    sizes = sorted(made(STEP, SIDE**2, MAX_RATIO), key=lambda size: size[0] / size[1])
    found = []
    for caption, image in photographs().items():
        size = np.array([image.size])
        bucket = sizes[int(nearest(sizes, size)[0])]
        cropped = {name: round(float(cropped_away(of, size)[0]), 4) for name, of in (("bucket", bucket), ("square", (1, 1)))}
        found.append(
            {"photograph": caption, "size": "{}x{}".format(*image.size), "brought_to": "{}x{}".format(*bucket), **cropped}
        )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Each photograph as its bucket has it, and as a square."""
    images = photographs()
    rows = []
    for row in found:
        width, height = size_named(row["brought_to"])
        drawn = [brought_to(images[row["photograph"]], size) for size in ((width * HEIGHT // height, HEIGHT), (HEIGHT, HEIGHT))]
        rows.append((f"{row['brought_to']}: {row['bucket']:.0%} cropped, square {row['square']:.0%}", drawn))
    save_png(labelled_grid(rows).quantize(COLORS), path)


def brought_to(image: Image.Image, size: Size) -> Image.Image:
    return crop_centre(resize_to_cover(image, size, Image.Resampling.LANCZOS), size)


def write_copies(directory: Path) -> Path:
    """The photographs, several times, each copy a little brighter than the one before."""
    write_images(directory / "whole", 256)
    (directory / "copies").mkdir()
    for path in sorted((directory / "whole").glob("*.jpg")):
        for copy in range(COPIES):
            name = f"{path.stem}-{copy}"
            Image.open(path).point(lambda value, copy=copy: min(value + copy, 255)).save(directory / "copies" / f"{name}.png")
            (directory / "copies" / f"{name}.txt").write_text(path.stem)
    return directory / "copies"


def rates(options: dict[str, Any], directory: Path, buckets: bool) -> dict[str, float]:
    """Samples per second of encoding and of training."""
    output = directory / "run"
    config = TrainConfig.model_validate(options | {"output_dir": str(output), "buckets": buckets})
    processes = Processes()
    encoding = open_encoding(config)
    started = time.perf_counter()
    build_parts(config, encoding, processes)
    encoded = time.perf_counter() - started
    indexes = read_indexes(config.shards_path).values()
    train(config)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    trained = statistics.median(line["samples_per_second"] for line in lines[WARM:])
    pixels = sum(index.total("image_rows") * np.prod(index.fields["latent_mean"].shape[1:]) for index in indexes)
    shutil.rmtree(output)
    records = sum(index.records for index in indexes)
    return {"encode": records / encoded, "train": trained, "pixels": float(pixels) / records}


def options_of(directory: Path) -> dict[str, Any]:
    """Of both ways, on a model and images that are written to a directory."""
    return {
        "family": "sd", **write_stable_diffusion(directory / "model"), "train_data_dir": str(write_copies(directory)),
        "resolution": 64, "center_crop": True, "train_batch_size": 8, "max_train_steps": STEPS, "log_every": 1, "seed": 0,
        "report_to": "none", "quiet": True,
    }  # fmt: skip


def cost() -> dict[str, Any]:
    """Medians of samples per second with buckets and without, and their ratios."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        options = options_of(directory)
        turns: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for turn in range(TURNS + 1):
            for buckets in (False, True):
                found = rates(options | ({"bucket_step": 16} if buckets else {}), directory, buckets)
                if turn:  # the first one loads what all of them use
                    turns[buckets].append(found)
    measured: dict[str, Any] = {}
    for what in ("encode", "train", "pixels"):
        square, bucketed = (statistics.median(found[what] for found in turns[buckets]) for buckets in (False, True))
        if what != "pixels":
            measured |= {f"{what}_square": round(square, 1), f"{what}_buckets": round(bucketed, 1)}
        measured[f"{what}_ratio"] = round(bucketed / square, 3)
    return measured


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--picture", type=Path, help="draw the photographs there, as a PNG")
    parser.add_argument("--no-cost", action="store_true", help="do not measure what buckets cost")
    options = parser.parse_args()
    quiet_libraries()
    messages.begin(quiet=True)
    found = compare()
    for row in found:
        print("  ".join(f"{value:>14}" for value in row.values()))
    mean = {way: round(statistics.mean(row[way] for row in found), 4) for way in ("bucket", "square")}
    print(f"cropped away on average: {mean['bucket']:.1%} with buckets, {mean['square']:.1%} as squares")
    if options.picture:
        draw(found, options.picture)
    measured = {} if options.no_cost else cost()
    for name, value in measured.items():
        print(f"{name}: {value:g}")
    write_result(options.json, __doc__, photographs=found, mean=mean, **({"cost": measured} if measured else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
