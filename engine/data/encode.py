"""Encoding a source into latent shards: on all processes, with decoding threads, resumable after any interruption."""

import concurrent.futures
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.config.options import CacheConfig, options_of
from engine.data.format.index import INDEX, Field, Index, ShardEntry
from engine.data.format.shard import shard_name, write_shard
from engine.data.sources.interface import Refused, Source
from engine.errors import UserError
from engine.files import PARTIAL, digest, digest_of
from engine.processes import Processes
from engine.tensors import read_header


class Encoder(Protocol):
    """What building shards needs of a family; documented in `engine.models.family.Family`."""

    captioned: bool

    @property
    def record_spec(self) -> dict[str, Field]: ...
    def encoder_identity(self) -> dict[str, Any]: ...
    def preprocessing_identity(self) -> dict[str, Any]: ...
    def load_encoders(self, device: torch.device) -> None: ...
    def free_encoders(self) -> None: ...
    def prepare(self, image: Image.Image, record: int) -> list[dict[str, Tensor]]: ...
    def encode_images(self, batch: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]: ...


@dataclass
class Plan:
    """Which captions every sample has, before any image is read.

    numbers: per sample the numbers of its captions, None for a refused one.
    texts: the distinct captions in order of first appearance; a caption's number is its place here.
    first_of_shard: [shards + 1], the number of the first caption that each shard stores.
    refused: sample -> reason.
    """

    numbers: list[list[int] | None]
    texts: list[str]
    first_of_shard: list[int]
    refused: dict[int, str]


def make_plan(source: Source, shard_records: int, captioned: bool) -> Plan:
    """Numbers the captions; every process comes to the same plan on its own."""
    plan = Plan([], [], [0], {})
    number_of: dict[str, int] = {}
    for index in range(len(source)):
        try:
            captions = source.captions(index) if captioned else []
            for caption in captions:
                number_of.setdefault(caption, len(number_of))
            plan.numbers.append([number_of[caption] for caption in captions])
        except Refused as refused:
            plan.numbers.append(None)
            plan.refused[index] = str(refused)
        if (index + 1) % shard_records == 0 or index + 1 == len(source):
            plan.first_of_shard.append(len(number_of))
    plan.texts = list(number_of)
    return plan


def identity_of(config: CacheConfig, family: Encoder, source: Source) -> dict[str, Any]:
    """Everything that shapes the content of the shards."""
    return {
        "family": config.family,
        "source": source.identity(),
        "models": family.encoder_identity(),
        "preprocessing": family.preprocessing_identity(),
        "precision": config.mixed_precision,
        "caption_column": config.caption_column if family.captioned else None,
        "shard_records": config.shard_records,
    }


def build(config: CacheConfig, family: Encoder, source: Source, processes: Processes) -> Index:
    """Builds what is missing of the shards and returns the index.

    Raises:
        UserError: the directory holds shards of something else, or `--strict` met a sample that cannot be used.
    """
    directory = config.shards_path
    identity = identity_of(config, family, source)
    fingerprint = digest_of(identity)
    if (directory / INDEX).exists():
        return _existing(directory, identity, fingerprint)
    directory.mkdir(parents=True, exist_ok=True)
    plan = make_plan(source, config.shard_records, family.captioned)
    if config.strict and plan.refused:
        sample, reason = next(iter(plan.refused.items()))
        raise UserError(f"--strict: {source.name(sample)}: {reason}")

    count = len(plan.first_of_shard) - 1
    mine = range(processes.rank, count, processes.world)
    missing = [number for number in mine if not _is_complete(directory / shard_name(number), fingerprint)]
    started = time.perf_counter()
    if missing:
        _encode(config, family, source, plan, missing, fingerprint, processes)
    seconds = max(processes.gather_objects(time.perf_counter() - started))

    entries: list[tuple[ShardEntry, list[dict[str, str]]]] = [_describe(directory / shard_name(n)) for n in mine]
    gathered = processes.gather_objects(entries)
    by_file = {entry.file: (entry, refused) for part in gathered for entry, refused in part}
    ordered = [by_file[shard_name(number)] for number in range(count)]
    index = Index(
        family=config.family,
        fingerprint=fingerprint,
        identity=identity,
        config={name: value for name, value in options_of(config).items() if name in CacheConfig.model_fields},
        fields=family.record_spec,
        shards=[entry for entry, _ in ordered],
        refused=[item for _, refused in ordered for item in refused],
        encode_seconds=seconds,
    )
    if processes.is_first:
        index.write(directory)
        for leftover in directory.glob(f"*{PARTIAL}"):
            leftover.unlink()
    processes.barrier()
    return index


def _existing(directory: Path, identity: dict[str, Any], fingerprint: str) -> Index:
    index = Index.read(directory)
    if index.fingerprint != fingerprint:
        changed = ", ".join(key for key in identity if identity[key] != index.identity.get(key)) or "format"
        raise UserError(
            f"{directory}: the shards there were built from something else (different: {changed}); "
            "name another --shards_dir, or delete that directory to build again"
        )
    return index


def _is_complete(path: Path, fingerprint: str) -> bool:
    try:
        return read_header(path)[1].get("fingerprint") == fingerprint
    except (OSError, ValueError):
        return False


def _describe(path: Path) -> tuple[ShardEntry, list[dict[str, str]]]:
    _, metadata, _ = read_header(path)
    entry = ShardEntry(
        path.name,
        metadata["records"],
        metadata["image_rows"],
        metadata["caption_rows"],
        path.stat().st_size,
        digest(path),
    )
    return entry, metadata["refused"]


def _encode(
    config: CacheConfig,
    family: Encoder,
    source: Source,
    plan: Plan,
    shards: list[int],
    fingerprint: str,
    processes: Processes,
) -> None:
    family.load_encoders(processes.device)
    size = config.shard_records
    total = sum(min(size, len(source) - number * size) for number in shards)
    with (
        concurrent.futures.ThreadPoolExecutor(max(config.dataloader_num_workers, 1)) as pool,
        tqdm(total=total, desc="Encoding", unit="image", disable=None if processes.is_first else True) as progress,
    ):
        for number in shards:
            indices = range(number * size, min((number + 1) * size, len(source)))
            prepared = _prepare(config, family, source, plan, indices, pool)
            tensors, metadata = _encode_shard(config, family, plan, number, prepared, progress)
            refused = [{"source": source.name(index), "reason": reason} for index, reason in metadata["refused"]]
            write_shard(
                config.shards_path / shard_name(number),
                tensors,
                metadata | {"refused": refused, "fingerprint": fingerprint},
            )
    family.free_encoders()


Prepared = tuple[int, list[dict[str, Tensor]] | str]


def _prepare(
    config: CacheConfig,
    family: Encoder,
    source: Source,
    plan: Plan,
    indices: range,
    pool: concurrent.futures.ThreadPoolExecutor,
) -> Iterator[Prepared]:
    """Decoded and transformed variants of each sample, or why there are none, in order; a bounded number are in flight."""

    def prepare(index: int) -> Prepared:
        if index in plan.refused:
            return index, plan.refused[index]
        try:
            return index, family.prepare(source.image(index), index)
        except Refused as refused:
            if config.strict:
                raise UserError(f"--strict: {source.name(index)}: {refused}", alone=True) from None
            return index, str(refused)

    if config.dataloader_num_workers == 0:
        yield from map(prepare, indices)
        return
    ahead = 2 * config.encode_batch_size + config.dataloader_num_workers
    futures = [pool.submit(prepare, index) for index in indices[:ahead]]
    for position in range(len(indices)):
        yield futures[position].result()
        if position + ahead < len(indices):
            futures.append(pool.submit(prepare, indices[position + ahead]))


def _encode_shard(
    config: CacheConfig, family: Encoder, plan: Plan, number: int, prepared: Iterator[Prepared], progress: tqdm
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of one shard, and its metadata with `refused` as (sample, reason)."""
    parts: dict[str, list[Tensor]] = {name: [] for name in family.record_spec}
    pending: list[dict[str, Tensor]] = []
    source_numbers: list[int] = []
    image_offsets, caption_offsets, caption_numbers = [0], [0], []
    refused: list[tuple[int, str]] = []

    def encode_pending(count: int) -> None:
        batch = {name: torch.stack([image[name] for image in pending[:count]]) for name in pending[0]}
        for name, tensor in family.encode_images(batch).items():
            parts[name].append(tensor.cpu())
        del pending[:count]

    for index, result in prepared:
        progress.update()
        if isinstance(result, str):
            refused.append((index, result))
            continue
        numbers = plan.numbers[index]
        assert numbers is not None
        source_numbers.append(index)
        pending.extend(result)
        image_offsets.append(image_offsets[-1] + len(result))
        caption_numbers.extend(numbers)
        caption_offsets.append(len(caption_numbers))
        while len(pending) >= config.encode_batch_size:
            encode_pending(config.encode_batch_size)
    if pending:
        encode_pending(len(pending))

    texts = plan.texts[plan.first_of_shard[number] : plan.first_of_shard[number + 1]]
    for start in range(0, len(texts), config.encode_batch_size):
        for name, tensor in family.encode_captions(texts[start : start + config.encode_batch_size]).items():
            parts[name].append(tensor.cpu())

    tensors = {
        "source": torch.tensor(source_numbers, dtype=torch.int64),
        "image_offsets": torch.tensor(image_offsets),
        "caption_offsets": torch.tensor(caption_offsets),
        "caption_numbers": torch.tensor(caption_numbers, dtype=torch.int64),
    }
    for name, field in family.record_spec.items():
        tensors[name] = torch.cat(parts[name]) if parts[name] else torch.empty(0, *field.shape, dtype=field.dtype)
    metadata = {
        "records": len(source_numbers),
        "image_rows": image_offsets[-1],
        "caption_rows": len(texts),
        "captions": texts,
        "refused": refused,
    }
    return tensors, metadata
