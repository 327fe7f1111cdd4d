"""An index of so many records as no disk here holds, opened and drawn from.

An index over generated shards is opened, and batches are drawn; then the same ones again, because a shard is judged when it is
opened for the first time. Shards that are drawn from are sparse files, rows of zeros with their checksums; of the others there
is a name, which is all that opening looks at.

Counted before: 104 bytes of arrays for every shard of 1,024 records, and 48 for where its tensors lie once it was opened; a
look at every name costs a microsecond. So 100 million records take 0.2 s and 10 MiB.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from benchmarks.tools.drawing import draw
from benchmarks.tools.kinds import SEED
from benchmarks.tools.shards import FAMILIES, fields_of
from engine.data.format.index import CHECKSUMS, CONTENT, ENTRY, NUMBERS, OWN, TEXTS, Index, shard_name
from engine.data.format.reader import Shards
from engine.data.format.shard import Header, Shard, checksum_of, offsets_of
from engine.data.samples.order import records_of
from engine.files import digest_of
from engine.tensors import bytes_of, header_of, in_file_order

SHARD = 1024  # records of a shard
BATCH, BATCHES = 64, 64
FIELDS = fields_of("prior")


def write_sparse_shard(path: Path, covers: range) -> None:
    """A shard of which every sample became a record, with rows of zeros."""
    count = len(covers)
    numbers = {
        "source": torch.arange(covers.start, covers.stop),
        "caption_texts": torch.empty(0, dtype=torch.uint8),
        "caption_texts_offsets": offsets_of([0] * count),
        "names": torch.empty(0, dtype=torch.uint8),
        "names_offsets": offsets_of([0] * count),
        "refused": torch.empty(0, dtype=torch.uint8),
        "contents": torch.full([count, CONTENT], 255, dtype=torch.uint8),
    }
    said = Header(
        format_version=2, fingerprint=digest_of({}), records=count, image_rows=count, caption_rows=count, variants=1,
        captions=OWN, first_sample=covers.start, samples=count, checksum=checksum_of(NUMBERS, numbers),
        texts_checksum=checksum_of(TEXTS, numbers),
    )  # fmt: skip
    for name, field in FIELDS.items():
        checksum = np.array(xxhash.xxh3_64_intdigest(bytes(field.row_bytes)), np.uint64).view(np.int64)
        numbers[f"{CHECKSUMS}{name}"] = torch.full([count], int(checksum))
    rows = {name: torch.empty(count, *field.shape, dtype=field.dtype, device="meta") for name, field in FIELDS.items()}
    tensors = in_file_order(numbers | rows)
    header, starts = header_of(tensors, {"engine": said.model_dump_json()})
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in numbers.items():
            file.seek(starts[name])
            file.write(bytes_of(tensor).numpy().data)
        file.truncate(max(starts[name] + tensor.numel() * tensor.dtype.itemsize for name, tensor in tensors.items()))


def write_index(directory: Path, records: int) -> None:
    """The index of shards of so many records, and those that the first batches read; the others are empty files."""
    count = -(-records // SHARD)
    shards = np.zeros(count, ENTRY)
    shards["number"] = np.arange(count)
    shards["first_sample"] = shards["number"] * SHARD
    for name in ("records", "samples", "image_rows", "caption_rows"):
        shards[name] = np.minimum(records - shards["first_sample"], SHARD)
    shards["variants"], shards["captions"], shards["bytes"] = 1, OWN, 2**20
    read = set((records_of(SEED, torch.arange(BATCH * BATCHES), records) // SHARD).tolist())
    for number in range(count):
        path = directory / shard_name(number)
        if number in read:
            write_sparse_shard(path, range(number * SHARD, min((number + 1) * SHARD, records)))
            shards["bytes"][number] = path.stat().st_size
            shards["contents"][number] = np.frombuffer(Shard(path, FIELDS, {}).content, np.uint8)
        else:
            path.touch()
    Index(FAMILIES["prior"], digest_of({}), {}, {}, FIELDS, shards).write(directory)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(shards: Shards) -> tuple[float, float]:
    """Seconds to the first batch, and samples per second over all."""
    started = time.perf_counter()
    with draw(shards, BATCH, range(BATCHES)) as batches:
        next(batches)
        first = time.perf_counter() - started
        samples = BATCH + sum(len(batch.slots) for batch in batches)
    return first, samples / (time.perf_counter() - started)


def simulate(records: int) -> dict[str, Any]:
    """Seconds and memory to open the index, seconds to the first batch, and samples per second at first and once more."""
    with tempfile.TemporaryDirectory() as directory:
        write_index(Path(directory), records)
        before, started = resident_bytes(), time.perf_counter()
        shards = Shards(Path(directory))
        seconds, opened = time.perf_counter() - started, resident_bytes()
        first, rate = measure(shards)
        _, again = measure(shards)
    return {
        "records": records, "shards": len(shards.index.shards), "open_seconds": seconds,
        "open_mib": (opened - before) / 2**20, "first_batch_seconds": first, "samples_per_second": rate,
        "samples_per_second_again": again, "mib_in_the_end": (resident_bytes() - before) / 2**20,
    }  # fmt: skip
