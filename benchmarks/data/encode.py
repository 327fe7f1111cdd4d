"""How fast does each family encode into latent shards? `python -m benchmarks.data.encode [--tiny] [--images 8] [--batch 4]`

Photographs are prepared in one thread and encoded, with their captions, by the frozen models of the published size (random
weights), as `engine.data.encode` does it. On a GPU the encoders run in bf16, on a CPU in fp32. `--tiny` takes the few thousand
weights of `examples.tiny_models` instead, to try the benchmark itself.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from tqdm import tqdm

from benchmarks.tools.checkpoints import PRECISION, opened
from benchmarks.tools.published import TINY
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import problem
from benchmarks.tools.timing import synchronize
from engine.quiet import quiet_libraries
from examples.photographs import photographs

CHECKPOINTS = ["SD 1.5, 512 px", "Kandinsky 2.2 prior", "Kandinsky 2.2 decoder, 768 px", "Wuerstchen v2 prior, 768 px"]
REPEATS = 3
SECONDS = 60  # that a row takes on a GPU, most of them to write random weights and read them again


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median time of `work`, after one run to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure(name: str, images: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Images prepared, images encoded and captions encoded per second, and the bytes of a sample's record."""
    with opened(name, device) as checkpoint:
        encoding, encoder = checkpoint.family.encoding, checkpoint.load_encoder()
    pictures = list(photographs().items())[:images]
    prepared = [encoding.prepare(image, 0)[0] for _, image in pictures]
    stacked = {key: torch.stack([item[key] for item in prepared[:batch]]) for key in prepared[0]}
    captions = [caption for caption, _ in pictures][:batch]
    row: dict[str, Any] = {
        "prepared_per_second": len(pictures) / seconds(lambda: [encoding.prepare(image, 0) for _, image in pictures], device),
        "images_per_second": len(prepared[:batch]) / seconds(lambda: encoder.encode_images(stacked), device),
    }
    if encoding.captioned:
        row["captions_per_second"] = len(captions) / seconds(lambda: encoder.encode_captions(captions), device)
    row["bytes_per_sample"] = sum(field.row_bytes for field in encoding.record_spec.values())
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'model':32}{'prepared/s':>12}{'images/s':>12}{'captions/s':>12}{'KiB/sample':>12}"]
    for row in rows:
        if absent := problem(row):
            lines.append(f"{row['model']:32}{absent}")
            continue
        captions = f"{row['captions_per_second']:.3g}" if "captions_per_second" in row else "-"
        lines.append(f"{row['model']:32}{row['prepared_per_second']:>12.3g}{row['images_per_second']:>12.3g}{captions:>12}"
                     f"{row['bytes_per_sample'] / 2**10:>12.1f}")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights instead of the published size")
    parser.add_argument("--images", type=int, default=8, help="photographs to prepare (default: 8)")
    parser.add_argument("--batch", type=int, default=4, help="images and captions encoded together (default: 4)")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    rows = Rows(options.json, __doc__, options.minutes)
    measured = []
    for name in tqdm(list(TINY) if options.tiny else CHECKPOINTS, disable=None):
        work = partial(measure, name, options.images, options.batch, device)
        about = {"model": name, "batch": options.batch, "precision": PRECISION[device.type]}
        measured.append(rows.measure(f"{name}, batch {options.batch}", 1 if options.tiny else SECONDS, work, **about))
    print(table(measured))
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
