"""What does it cost to build shards at scale? `python -m benchmarks.data.building [--rows 100000000] [--json FILE]`

A plan: a table of so many rows, of which equal ones are stored once, is opened and planned by an encoder that ends at the
first sample; before it one of a thousandth of the rows. A rate: photographs of 512 px are encoded by 1, 2 and 4 commands that
build together, each on one thread, with models of a few thousand weights, so that reading and decoding set the time; every
command has built two images elsewhere before the clock starts. Growth: the bytes of rows that are encoded when a data set of
10,000 images gains one.

Counted before: a plan is 24 bytes for every 1,024 rows, so 2.3 MiB for 100 million, and a slot of 216 bytes in a file; commands
that share two cores are at most twice as fast as one.
"""

import contextlib
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor

from benchmarks.tools.place import ENVIRONMENT
from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.simulated import resident_bytes
from benchmarks.tools.tables import problem
from engine.config.options import CacheConfig
from engine.data.encode import encode_source
from engine.data.format.index import INDEX, Field
from engine.data.sources.interface import Source
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes
from examples.photographs import write_images
from examples.tiny_models import write_stable_diffusion

GROUP = 10**6  # rows of a row group
TOGETHER = (1, 2, 4)
TURNS = 3
IMAGES = 10_000  # of the data set that grows
PLAN_SECONDS, RATES_SECONDS = 20, 180  # that these take
BUILD = """
import sys, time
from pathlib import Path
from engine.quiet import quiet_libraries
quiet_libraries()
from engine.shards import build_command
ready, *arguments = sys.argv[1:]
build_command([*arguments, "--shards_dir", ready + "-shards", "--max_train_samples", "2"])
Path(ready).touch()
while not (Path(ready).parent / "go").exists():
    time.sleep(0.001)
sys.exit(build_command(arguments))
"""


class Begun(Exception):
    """The first sample was given to the encoder."""


class Stub(Encoding, Encoder):
    """Encodes nothing: a record of four bytes for an image.

    begins: whether to end with the first sample.
    """

    mean, captioned, size = "value", False, (1, 1)
    keeps_tokens = False
    image_fields = record_spec = {"value": Field((1,), torch.float32, "image")}  # noqa: RUF012

    def __init__(self, begins: bool) -> None:
        self.begins, self.encoded, self._identity = begins, 0, {}

    def encoder_digests(self) -> dict[str, Any]:
        return {}

    def preprocessing_identity(self) -> dict[str, Any]:
        return {}

    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]:
        return [{"value": torch.tensor([float(record)])}]

    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.encoded += batch["value"].nbytes
        return batch

    def decode(self, rows: Tensor) -> list[Image.Image]:
        raise NotImplementedError

    def load_encoder(self, device: torch.device) -> Encoder:
        raise NotImplementedError

    @contextlib.contextmanager
    def encoder(self, device: torch.device) -> Iterator[Encoder]:
        if self.begins:
            raise Begun
        yield self


class Numbers(Source):
    """Images that are their own numbers, as many as asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.noticed = count, Counter[str]()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def refusal(self, index: int) -> None:
        return None

    def captions(self, index: int) -> list[str]:
        return []

    def content(self, index: int) -> bytes:
        return str(index).encode()

    def size(self, index: int) -> tuple[int, int]:
        return 1, 1

    def decode(self, content: bytes) -> Image.Image:
        return Image.new("RGB", (1, 1))

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(self.count, dtype=np.uint64), np.ones(self.count, np.int64)

    def identity(self) -> dict[str, Any]:
        return {}


def options(directory: Path, **more: Any) -> CacheConfig:
    """Of a build without models; the family is the one without captions."""
    values = {"family": "kandinsky-decoder", "shards_dir": str(directory / "shards"), "cache_dir": str(directory / "cache")}
    return CacheConfig.model_validate(values | more)


def write_table(path: Path, rows: int) -> None:
    """A table of equal rows, which takes some bytes for a million."""
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(min(rows, GROUP), np.int8)), pa.array([b"one image"]))
    table = pa.table({"image": image.cast(pa.binary())})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for first in range(0, rows, GROUP):
            writer.write_table(table.slice(0, min(rows - first, GROUP)), GROUP)


def plan(directory: Path, rows: int) -> dict[str, Any]:
    """Seconds from the name of a table to the first sample, and MiB of memory for that."""
    directory.mkdir()
    write_table(directory / "train.parquet", rows)
    config = options(directory, dataset_name=str(directory / "train.parquet"))
    before, started = resident_bytes(), time.perf_counter()
    with contextlib.suppress(Begun):
        encode_source(config, Stub(begins=True), Processes())
    seconds = time.perf_counter() - started
    return {"rows": rows, "shards": -(-rows // config.shard_records), "seconds": seconds,
            "mib": (resident_bytes() - before) / 2**20}  # fmt: skip


def grow(directory: Path, images: int) -> dict[str, Any]:
    """Bytes of rows that are encoded for all images, and for one more."""
    config, whole, more = options(directory, train_data_dir="none"), Stub(begins=False), Stub(begins=False)
    encode_source(config, whole, Processes(), source=Numbers(images))
    encode_source(config, more, Processes(), source=Numbers(images + 1))
    return {"images": images, "encoded_bytes": whole.encoded, "encoded_bytes_for_one_more": more.encoded,
            "bytes_of_a_shard": whole.encoded // images * config.shard_records}  # fmt: skip


def rate(directory: Path, model: str, images: Path, together: int) -> float:
    """Images per second of so many commands that build together."""
    directory.mkdir()
    arguments = [
        "--family", "sd", "--pretrained_model_name_or_path", model, "--train_data_dir", str(images), "--center_crop",
        "--resolution", "64", "--shard_records", "16", "--shards_dir", str(directory / "shards"),
    ]  # fmt: skip
    ready = [directory / f"ready-{number}" for number in range(together)]
    commands = [
        subprocess.Popen([sys.executable, "-c", BUILD, str(file), *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        for file in ready
    ]
    while not all(file.exists() for file in ready):
        time.sleep(0.01)
    time.sleep(0.5)
    started = directory / "go"
    started.touch()
    if any(command.wait() for command in commands):
        raise RuntimeError("a build failed")
    ended = directory / "shards" / INDEX  # before these processes are
    return len(list(images.glob("*.jpg"))) / (ended.stat().st_mtime - started.stat().st_mtime)


def rates(directory: Path, count: int) -> dict[str, Any]:
    model = write_stable_diffusion(directory / "model")["pretrained_model_name_or_path"]
    images = write_images(directory / "images")
    lines = (images / "metadata.jsonl").read_text().splitlines()
    copies = [(copy, line) for copy in range(-(-count // len(lines))) for line in lines][:count]
    for copy, line in copies:
        name = line.split('"')[3]
        if copy:
            shutil.copyfile(images / name, images / f"{copy}-{name}")
    renamed = [line.replace('"file_name": "', f'"file_name": "{copy}-') if copy else line for copy, line in copies]
    (images / "metadata.jsonl").write_text("\n".join(renamed))
    measured: dict[int, list[float]] = {together: [] for together in TOGETHER}
    for turn, together in itertools.product(range(TURNS), TOGETHER):  # in turns, because others may use the machine
        measured[together].append(rate(directory / f"turn-{turn}-{together}", model, images, together))
    return {"rates": [
        {"processes": together, "images_per_second": max(found), "all": found} for together, found in measured.items()
    ]}  # fmt: skip


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=10**8, help="of the table that is planned (default: %(default)s)")
    parser.add_argument("--images", type=int, default=448, help="that are encoded by commands together (default: %(default)s)")
    given = parser.parse_args()
    kept = Rows(given.json, __doc__, given.minutes)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for rows in (max(given.rows // 1000, 1), given.rows):
            row = kept.measure(f"plan, {rows:,} rows", PLAN_SECONDS, partial(plan, directory / f"rows-{rows}", rows))
            print(f"{rows:>13,} rows ", problem(row) or f"planned in {row['seconds']:.2f} s and {row['mib']:.1f} MiB")
        row = kept.measure(f"growth, {IMAGES:,} images", PLAN_SECONDS, partial(grow, directory / "grown", IMAGES))
        print(f"one image more than {IMAGES:,}:", problem(row) or f"{row['encoded_bytes_for_one_more']} bytes are encoded, "
              f"of {row['bytes_of_a_shard']} of a shard")  # fmt: skip
        row = kept.measure(f"rates, {given.images} images", RATES_SECONDS, partial(rates, directory, given.images))
        print(problem(row) or "\n".join(
            f"{of['processes']} processes  {of['images_per_second']:.1f} images/s" for of in row["rates"]))  # fmt: skip
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
