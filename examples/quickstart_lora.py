"""What does a LoRA learn on the CPU in minutes? The quickstart's pipeline a look that it never saw, digits in black on white.

`python -m engine.run --lora_rank` trains an adapter of the pipeline that `make quickstart` left (which is made first where it
is missing), on some of its digits, inverted, under the captions that they had. Then plain diffusers draws ten images of each
digit with the adapter and without. The quickstart's classifier, which knows only white on black, has to recognise them once
they are inverted back.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from PIL import Image, ImageOps

from benchmarks.tools.rows import write_result
from engine.files import digest, write_json
from engine.picture import labelled_grid, save_png
from engine.quiet import quiet_libraries
from examples import quickstart
from examples.quickstart import GUIDANCE, IMAGES_PER_DIGIT, caption, draw, recognised

ROOT = Path("build/quickstart-lora")
BASE = quickstart.ROOT / "trained"
IMAGES = 500  # of the quickstart's 1,797
STEPS = 300
RANK = 16
LEAST = 0.8  # of the digits drawn with the adapter, that are to be recognised


def write_images(directory: Path) -> None:
    """The first of the quickstart's images, inverted, with their captions."""
    directory.mkdir(parents=True)
    lines = (quickstart.ROOT / "images" / "metadata.jsonl").read_text().splitlines()[:IMAGES]
    for name in (json.loads(line)["file_name"] for line in lines):
        ImageOps.invert(Image.open(quickstart.ROOT / "images" / name).convert("RGB")).save(directory / name)
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def train(images: Path, output: Path) -> None:
    """What a user runs."""
    command = [
        sys.executable, "-m", "engine.run", "--family", "sd",
        "--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(images), "--output_dir", str(output),
        "--lora_rank", str(RANK), "--lora_targets", "all-linear", "convolutions",
        "--resolution", str(quickstart.RESOLUTION), "--center_crop", "--encode_batch_size", "64",
        "--train_batch_size", str(quickstart.BATCH), "--max_train_steps", str(STEPS), "--learning_rate", "2e-3",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "20", "--snr_gamma", "5.0", "--seed", "0",
        "--proportion_empty_prompts", "0.1", "--checkpointing_steps", str(STEPS),
    ]  # fmt: skip
    quickstart.run(command)


def digests(pipeline: Path) -> dict[str, str]:
    """Of every file of a pipeline."""
    return {str(file.relative_to(pipeline)): digest(file) for file in sorted(pipeline.rglob("*")) if file.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser("examples.quickstart_lora", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the report there too, with the machine and the versions")
    options = parser.parse_args()
    quiet_libraries()
    if not (BASE / "model_index.json").is_file():
        print("The pipeline of the quickstart is trained first")
        subprocess.run([sys.executable, quickstart.__file__], check=True)
    started = time.perf_counter()
    shutil.rmtree(ROOT, ignore_errors=True)
    images, output = ROOT / "images", ROOT / "trained"
    write_images(images)
    before = digests(BASE)
    train(images, output)
    unchanged = digests(BASE) == before

    drawn = {name: draw(BASE, GUIDANCE, IMAGES_PER_DIGIT, lora) for name, lora in (("without", None), ("with", output))}
    found = {name: recognised([[ImageOps.invert(image) for image in row] for row in rows]) for name, rows in drawn.items()}
    as_before = recognised(drawn["without"])
    grid = ROOT / "grid.png"
    half = IMAGES_PER_DIGIT // 2
    rows = [(caption(digit), drawn["without"][digit][:half] + drawn["with"][digit][:half]) for digit in range(10)]
    save_png(labelled_grid(rows), grid)
    file = output / "pytorch_lora_weights.safetensors"
    report = {
        "inverted_with": found["with"], "inverted_without": found["without"], "plain_without": as_before,
        "base_unchanged": unchanged, "seconds": time.perf_counter() - started, "adapter_bytes": file.stat().st_size,
    }  # fmt: skip
    write_json(ROOT / "report.json", report)
    write_result(options.json, f"{__doc__.splitlines()[0]} `python -m examples.quickstart_lora`", **report)
    print(f"""
{found["with"]:.0%} of {10 * IMAGES_PER_DIGIT} digits drawn with the adapter are recognised as black on white,
{found["without"]:.0%} without it, and {as_before:.0%} as white on black
base     {BASE}: {"the same, to the bit" if unchanged else "CHANGED"}
adapter  {file}, {report["adapter_bytes"] / 2**20:.2f} MiB
grid     {grid}: without the adapter on the left, with it on the right
report   {ROOT / "report.json"}, after {report["seconds"]:.0f} s""")
    if not unchanged or not found["with"] > max(LEAST, found["without"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
