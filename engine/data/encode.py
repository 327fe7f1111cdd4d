"""Encoding a source into latent shards: on all processes, with decoding threads, resumable after any interruption."""

import concurrent.futures
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from engine.config.options import CacheConfig, options_of
from engine.data.format.index import INDEX, Index, ShardEntry
from engine.data.format.shard import shard_name, write_shard
from engine.data.sources.interface import Refused, Source
from engine.errors import UserError
from engine.files import PARTIAL, digest, digest_of
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes
from engine.tensors import read_header


@dataclass(frozen=True)
class Captions:
    """Which captions every sample has, known before any image is read.

    numbers: per sample the numbers of its captions; none for a refused one.
    texts: the distinct captions in order of first appearance; a caption's number is its place here.
    first_of_shard: [shards + 1], the number of the first caption that each shard stores.
    refused: sample -> reason.
    """

    numbers: list[list[int]]
    texts: list[str]
    first_of_shard: list[int]
    refused: dict[int, str]

    @property
    def shards(self) -> int:
        return len(self.first_of_shard) - 1

    def texts_of(self, shard: int) -> list[str]:
        return self.texts[self.first_of_shard[shard] : self.first_of_shard[shard + 1]]


def number_captions(source: Source, shard_records: int, captioned: bool) -> Captions:
    """Every process comes to the same numbers on its own."""
    numbers: list[list[int]] = []
    first_of_shard, refused = [0], {}
    number_of: dict[str, int] = {}
    for sample in range(len(source)):
        try:
            captions = source.captions(sample) if captioned else []
            numbers.append([number_of.setdefault(caption, len(number_of)) for caption in captions])
        except Refused as reason:
            numbers.append([])
            refused[sample] = str(reason)
        if (sample + 1) % shard_records == 0 or sample + 1 == len(source):
            first_of_shard.append(len(number_of))
    return Captions(numbers, list(number_of), first_of_shard, refused)


def identity_of(config: CacheConfig, encoding: Encoding, source: Source) -> dict[str, Any]:
    """Everything that shapes the content of the shards."""
    return {
        "family": config.family,
        "source": source.identity(),
        "models": encoding.encoder_identity(),
        "preprocessing": encoding.preprocessing_identity(),
        "precision": config.mixed_precision,
        "caption_column": config.caption_column if encoding.captioned else None,
        "shard_records": config.shard_records,
    }


def encode_source(config: CacheConfig, encoding: Encoding, source: Source, processes: Processes) -> Index:
    """Encodes what is missing of the shards and returns the index.

    Raises:
        UserError: the directory holds shards of something else, or `--strict` met a sample that cannot be used.
    """
    directory = config.shards_path
    identity = identity_of(config, encoding, source)
    fingerprint = digest_of(identity)
    if (directory / INDEX).exists():
        return _existing_index(directory, identity, fingerprint)
    directory.mkdir(parents=True, exist_ok=True)
    captions = number_captions(source, config.shard_records, encoding.captioned)
    if config.strict and captions.refused:
        sample, reason = next(iter(captions.refused.items()))
        raise UserError(f"--strict: {source.name(sample)}: {reason}")

    mine = range(processes.rank, captions.shards, processes.world)
    missing = [number for number in mine if not _is_complete(directory / shard_name(number), fingerprint)]
    started = time.perf_counter()
    if missing:
        _encode_shards(config, encoding, source, captions, missing, fingerprint, processes)
    seconds = max(processes.gather_objects(time.perf_counter() - started))

    gathered = processes.gather_objects({number: _describe(directory / shard_name(number)) for number in mine})
    by_number = {number: described for part in gathered for number, described in part.items()}
    described = [by_number[number] for number in range(captions.shards)]
    index = Index(
        family=config.family,
        fingerprint=fingerprint,
        identity=identity,
        config={name: value for name, value in options_of(config).items() if name in CacheConfig.model_fields},
        fields=encoding.record_spec,
        shards=[entry for entry, _ in described],
        refused=[item for _, refused in described for item in refused],
        encode_seconds=seconds,
    )
    if processes.is_first:
        index.write(directory)
        for leftover in directory.glob(f"*{PARTIAL}"):
            leftover.unlink()
    processes.barrier()
    return index


def _existing_index(directory: Path, identity: dict[str, Any], fingerprint: str) -> Index:
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


def _encode_shards(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    captions: Captions,
    numbers: list[int],
    fingerprint: str,
    processes: Processes,
) -> None:
    """Encodes and writes the shards with these numbers."""
    samples_of = {number: _samples_of_shard(number, config.shard_records, len(source)) for number in numbers}
    with (
        encoding.encoder(processes.device) as encoder,
        concurrent.futures.ThreadPoolExecutor(max(config.dataloader_num_workers, 1)) as pool,
        tqdm(
            total=sum(map(len, samples_of.values())),
            desc="Encoding",
            unit="image",
            disable=None if processes.is_first else True,
        ) as progress,
    ):
        for number, samples in samples_of.items():
            prepared = _prepare(config, encoding, source, captions, samples, pool)
            tensors, metadata = _encode_shard(config, encoding, encoder, captions, number, prepared, progress)
            refused = [{"source": source.name(sample), "reason": reason} for sample, reason in metadata["refused"]]
            metadata |= {"refused": refused, "fingerprint": fingerprint}
            write_shard(config.shards_path / shard_name(number), tensors, metadata)


def _samples_of_shard(number: int, shard_records: int, samples: int) -> range:
    return range(number * shard_records, min((number + 1) * shard_records, samples))


# A sample with its decoded and transformed variants, or with the reason why there are none.
Prepared = tuple[int, list[dict[str, Tensor]] | str]


def _prepare(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    captions: Captions,
    samples: range,
    pool: concurrent.futures.ThreadPoolExecutor,
) -> Iterator[Prepared]:
    """Samples decoded and transformed, in order; a bounded number are in flight."""

    def prepare(sample: int) -> Prepared:
        if sample in captions.refused:
            return sample, captions.refused[sample]
        try:
            return sample, encoding.prepare(source.image(sample), sample)
        except Refused as refused:
            if config.strict:
                raise UserError(f"--strict: {source.name(sample)}: {refused}", alone=True) from None
            return sample, str(refused)

    if config.dataloader_num_workers == 0:
        yield from map(prepare, samples)
        return
    ahead = 2 * config.encode_batch_size + config.dataloader_num_workers
    futures: deque[concurrent.futures.Future[Prepared]] = deque()
    for sample in samples:
        futures.append(pool.submit(prepare, sample))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _encode_shard(
    config: CacheConfig,
    encoding: Encoding,
    encoder: Encoder,
    captions: Captions,
    number: int,
    prepared: Iterable[Prepared],
    progress: tqdm,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of one shard, and its metadata with `refused` as (sample, reason)."""
    records: list[int] = []
    variants: list[int] = []
    refused: list[tuple[int, str]] = []

    def images() -> Iterator[dict[str, Tensor]]:
        """The variants of all samples, one after another; notes what was seen."""
        for sample, result in prepared:
            progress.update()
            if isinstance(result, str):
                refused.append((sample, result))
                continue
            records.append(sample)
            variants.append(len(result))
            yield from result

    def encode_images(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return encoder.encode_images({name: torch.stack([image[name] for image in batch]) for name in batch[0]})

    texts = captions.texts_of(number)
    encoded = _encode_in_batches(images(), config.encode_batch_size, encode_images)
    encoded |= _encode_in_batches(texts, config.encode_batch_size, encoder.encode_captions)
    tensors = _record_tensors(records, variants, [captions.numbers[sample] for sample in records])
    for name, field in encoding.record_spec.items():
        tensors[name] = encoded[name] if name in encoded else torch.empty(0, *field.shape, dtype=field.dtype)
    metadata = {
        "records": len(records),
        "image_rows": sum(variants),
        "caption_rows": len(texts),
        "captions": texts,
        "refused": refused,
    }
    return tensors, metadata


Item = TypeVar("Item")


def _encode_in_batches(
    items: Iterable[Item], size: int, encode: Callable[[list[Item]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The fields of all items, on the host; no field where there are no items."""
    parts: dict[str, list[Tensor]] = {}
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        for name, tensor in encode(batch).items():
            parts.setdefault(name, []).append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _record_tensors(records: list[int], variants: list[int], caption_numbers: Sequence[list[int]]) -> dict[str, Tensor]:
    """The tensors that tie rows to records: of each its sample, its number of variants and the numbers of its captions."""
    return {
        "source": torch.tensor(records, dtype=torch.int64),
        "image_offsets": torch.tensor([0, *itertools.accumulate(variants)]),
        "caption_offsets": torch.tensor([0, *itertools.accumulate(map(len, caption_numbers))]),
        "caption_numbers": torch.tensor([*itertools.chain(*caption_numbers)], dtype=torch.int64),
    }
