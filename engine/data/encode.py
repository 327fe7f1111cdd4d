"""Encoding a source into latent shards: on all processes, with decoding threads, resumable after any interruption.

Whatever a sample raises while it is read, decoded, transformed or encoded refuses that sample and no other.
"""

import concurrent.futures
import contextlib
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.config.options import CacheConfig, TrainConfig, options_of
from engine.data.captions import Captions, drop_unusable_captions, listed, number_captions, offsets_of
from engine.data.format.index import INDEX, Index, ShardEntry, variants_of
from engine.data.format.shard import SHARD_NAME, Shard, shard_name, write_shard
from engine.data.identity import differences, identity_of
from engine.data.report import describe_refused, say_refused
from engine.data.sources.decode import refuse_extreme
from engine.data.sources.interface import Refused, Source, refusing
from engine.data.sources.room import room
from engine.errors import UserError
from engine.files import PARTIAL, digest, digest_of, excludes_others, lock
from engine.messages import Progress, busy, say
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes
from engine.tensors import read_header

# So many samples refused by the encoder, before it encoded any, are the encoder's fault.
_HOPELESS = 100


def encode_source(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    processes: Processes,
    check: Callable[[dict[str, Any]], None] = lambda identity: None,
) -> Index:
    """Encodes what is missing of the shards and returns the index. Of two runs one builds, and the other waits.

    Args:
        check: is given the identity of the shards before anything is encoded, to raise what is against it.

    Raises:
        UserError: the directory holds shards of something else, no sample can be used, or `--strict` met one that cannot.
    """
    directory = config.shards_path
    with busy("Hashing the frozen models and listing the data set"):
        identity = identity_of(config, encoding, source)
    check(identity)
    fingerprint = digest_of(identity)
    if processes.from_first((directory / INDEX).exists()):
        return _existing_index(directory, identity, fingerprint)
    captions = number_captions(source, config.shard_records, encoding.captioned)
    known = {sample: why for sample in range(len(source)) if (why := captions.refused.get(sample) or source.refusal(sample))}
    if config.strict and known:
        raise _strict(source, *next(iter(known.items())))
    if len(known) == len(source):
        raise _all_refused([listed(source, sample, why) for sample, why in known.items()])
    directory.mkdir(parents=True, exist_ok=True)
    with _only_builder(config, processes):
        if processes.from_first((directory / INDEX).exists()):  # built by the run that was waited for
            return _existing_index(directory, identity, fingerprint)
        return _build(config, encoding, source, captions, identity, processes)


@contextlib.contextmanager
def _only_builder(config: CacheConfig, processes: Processes) -> Iterator[None]:
    """Holds the directory of the shards, once no other run does, without what runs that were killed left half written."""
    directory, held = config.shards_path, None
    # A training holds its output directory already.
    waits = not isinstance(config, TrainConfig) or directory.resolve() != Path(config.output_dir).resolve()
    said = False
    try:
        while waits:
            held = lock(directory) if processes.is_first else None
            if held is not None and excludes_others(held):
                for leftover in itertools.chain(*(directory.glob(f"{name}*{PARTIAL}") for name in (INDEX, SHARD_NAME))):
                    leftover.unlink()
            waits = processes.from_first(held is None)
            if waits and not said:
                said = True
                say(f"{directory}: another run is building these shards; waiting for its end")
            if waits:
                time.sleep(1)
        yield
    finally:
        if held is not None:
            os.close(held)


def _build(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    captions: Captions,
    identity: dict[str, Any],
    processes: Processes,
) -> Index:
    directory, fingerprint = config.shards_path, digest_of(identity)
    paths = {number: directory / shard_name(number) for number in range(processes.rank, captions.shards, processes.world)}
    variants = variants_of(identity)

    def is_complete(number: int, path: Path) -> bool:
        """Whether a shard is there that an earlier build left, of the same samples and captions."""
        samples = _samples_of_shard(number, config.shard_records, len(source))
        try:
            shard = Shard(path, encoding.record_spec, captions.first_of_shard[number + 1], samples.stop)
            shard.require_variants(variants)
        except UserError:
            return False
        said = shard.said
        its_own = not said.records or int(shard.source[0]) >= samples.start
        all_of_them = said.records + len(said.refused) == len(samples)
        return its_own and all_of_them and said.fingerprint == fingerprint and said.captions == captions.texts_of(number)

    missing = [number for number, path in paths.items() if not is_complete(number, path)]
    started = time.perf_counter()
    if missing:
        _encode_shards(config, encoding, source, captions, missing, fingerprint, processes)
    seconds = max(processes.gather_objects(time.perf_counter() - started))
    drop_unusable_captions(list(paths.values()), encoding, source, processes)

    gathered = processes.gather_objects({number: _describe(path) for number, path in paths.items()})
    by_number = {number: described for part in gathered for number, described in part.items()}
    described = [by_number[number] for number in range(captions.shards)]
    refused = [item for _, items in described for item in items]
    if len(refused) == len(source):
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise _all_refused(refused)
    index = Index(
        family=config.family,
        fingerprint=fingerprint,
        identity=identity,
        config={name: value for name, value in options_of(config).items() if name in CacheConfig.model_fields},
        fields=encoding.record_spec,
        shards=[entry for entry, _ in described],
        refused=refused,
        encode_seconds=seconds,
    )
    if processes.is_first:
        index.write(directory)
    processes.barrier()
    for noticed, count in sum(processes.gather_objects(source.noticed), Counter()).items():
        say(f"{count} of {len(source)} images: {noticed}")
    say_refused(len(source), refused, directory / INDEX)
    return index


def _strict(source: Source, sample: int, why: Refused) -> UserError:
    return UserError(f"--strict: {source.name(sample)}: {why}", alone=True)


def _all_refused(refused: list[dict[str, str]], alone: bool = False) -> UserError:
    return UserError(f"not one of {len(refused)} samples can be used: {describe_refused(refused)}", alone=alone)


def _existing_index(directory: Path, identity: dict[str, Any], fingerprint: str) -> Index:
    index = Index.read(directory)
    if index.fingerprint != fingerprint:
        changed = differences(index.identity, identity) or "another format"
        raise UserError(
            f"{directory}: the shards there were built otherwise ({changed}); give the same options, name another "
            f"--shards_dir, give no data options to train on these, or delete {directory / INDEX} to build them again"
        )
    return index


def _describe(path: Path) -> tuple[ShardEntry, list[dict[str, str]]]:
    _, metadata, _ = read_header(path)
    counts = {name: metadata[name] for name in ("records", "image_rows", "caption_rows")}
    entry = ShardEntry(file=path.name, bytes=path.stat().st_size, sha256=digest(path), **counts)
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
        Progress(sum(map(len, samples_of.values())), "Encoding", "image") as progress,
    ):
        encoded = 0
        failed: list[tuple[int, Refused]] = []
        for number, samples in samples_of.items():
            shard = Encoded()
            prepared = _prepare(config, encoding, source, captions, samples, pool)
            failed += _encode_images(config, encoder, prepared, shard, progress)
            _encode_captions(config, encoder, captions, number, shard)
            encoded += len(shard.rows)
            if config.strict and (refusals := [*shard.refused.items(), *shard.unusable.items()]):
                raise _strict(source, *refusals[0])
            if not encoded and len(failed) >= _HOPELESS:
                raise _all_refused([listed(source, sample, why) for sample, why in failed], alone=True)
            refused = [listed(source, sample, shard.refused[sample]) for sample in samples if sample in shard.refused]
            tensors = _shard_tensors(shard, captions, encoding)
            metadata = {
                "records": len(tensors["source"]),
                "image_rows": int(tensors["image_offsets"][-1]),
                "caption_rows": len(shard.caption_rows),
                "captions": captions.texts_of(number),
                "refused": refused,
                "fingerprint": fingerprint,
            }
            if shard.unusable:
                metadata["unusable_captions"] = {
                    str(caption): [why.reason, why.detail] for caption, why in shard.unusable.items()
                }
            write_shard(config.shards_path / shard_name(number), tensors, metadata)


def _samples_of_shard(number: int, shard_records: int, samples: int) -> range:
    return range(number * shard_records, min((number + 1) * shard_records, samples))


# A sample with its decoded and transformed variants, or with the reason why there are none.
Prepared = tuple[int, list[dict[str, Tensor]] | Refused]


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
        with room.turn():
            made = make(sample)
        if config.strict and isinstance(made, Refused):
            raise _strict(source, sample, made)
        return sample, made

    def make(sample: int) -> list[dict[str, Tensor]] | Refused:
        try:
            with refusing("unreadable image"):
                image = source.image(sample)
                refuse_extreme(image.size, encoding.image_side, config.max_upscale)
            with refusing("image cannot be transformed"):
                return encoding.prepare(image, sample)
        except Refused as why:
            return Refused(why.reason, why.detail)  # `why` itself holds the frames with the image

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


Item = TypeVar("Item")
Row = dict[str, Tensor]


@dataclass
class Encoded:
    """What became of one shard's samples and captions.

    rows: the image rows of the samples that were encoded, (sample, row) for every variant, in order.
    refused: sample -> why it was not.
    caption_rows: one for every caption of the shard, empty for one that the encoder refused.
    unusable: number -> why a caption was refused.
    """

    rows: list[tuple[int, Row]] = field(default_factory=list)
    refused: dict[int, Refused] = field(default_factory=dict)
    caption_rows: list[Row] = field(default_factory=list)
    unusable: dict[int, Refused] = field(default_factory=dict)


def _encode_images(
    config: CacheConfig, encoder: Encoder, prepared: Iterable[Prepared], shard: Encoded, progress: Progress
) -> list[tuple[int, Refused]]:
    """Encodes the samples of a shard; a sample of which one variant fails is refused as a whole.

    Returns: those that the encoder refused.
    """

    def variants() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for sample, result in prepared:
            progress.update()
            if isinstance(result, Refused):
                shard.refused[sample] = result
            else:
                yield from ((sample, variant) for variant in result)

    def encode(batch: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
        return encoder.encode_images({name: torch.stack([image[name] for _, image in batch]) for name in batch[0][1]})

    rows: list[tuple[int, Row]] = []
    failed: dict[int, Refused] = {}
    for (sample, _), row in _encode_in_batches(variants(), config.encode_batch_size, encode, "image"):
        if isinstance(row, Refused):
            failed[sample] = row
        else:
            rows.append((sample, row))
    shard.refused |= failed
    shard.rows = [(sample, row) for sample, row in rows if sample not in failed]
    return list(failed.items())


def _encode_captions(config: CacheConfig, encoder: Encoder, captions: Captions, number: int, shard: Encoded) -> None:
    encoded = _encode_in_batches(captions.texts_of(number), config.encode_batch_size, encoder.encode_captions, "caption")
    for caption, (text, row) in enumerate(encoded, start=captions.first_of_shard[number]):
        if isinstance(row, Refused):
            shard.unusable[caption] = Refused(row.reason, f"{row.detail} (caption {text[:60]!r})")
        shard.caption_rows.append({} if isinstance(row, Refused) else row)


def _encode_in_batches(
    items: Iterable[Item], size: int, encode: Callable[[list[Item]], dict[str, Tensor]], kind: str
) -> Iterator[tuple[Item, Row | Refused]]:
    """Every item with its row, on the host, or with the reason why it has none."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield from zip(batch, _encode_batch(batch, encode, kind), strict=True)


def _encode_batch(batch: list[Item], encode: Callable[[list[Item]], dict[str, Tensor]], kind: str) -> list[Row | Refused]:
    """The rows of a batch; one that fails is encoded item by item, so that the culprit is known."""
    try:
        with refusing(f"{kind} cannot be encoded"):
            fields = {name: tensor.cpu() for name, tensor in encode(batch).items()}
    except torch.OutOfMemoryError:
        raise UserError(f"--encode_batch_size {len(batch)}: does not fit the device; try a smaller one", alone=True) from None
    except Refused as why:
        return [why] if len(batch) == 1 else [row for item in batch for row in _encode_batch([item], encode, kind)]
    finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in fields.values()]).all(0).tolist()
    overflow = any(tensor.dtype == torch.float16 for tensor in fields.values())
    unfit = Refused(f"{kind} encodes to values that are not finite", "fp16 overflows; try bf16" if overflow else "")
    return [{name: tensor[row] for name, tensor in fields.items()} if good else unfit for row, good in enumerate(finite)]


def _shard_tensors(shard: Encoded, captions: Captions, encoding: Encoding) -> dict[str, Tensor]:
    """All tensors of a shard: the fields, and those that tie their rows to records."""
    variants = Counter(sample for sample, _ in shard.rows)  # in the order of the samples
    numbers = [captions.numbers[sample] for sample in variants]
    tensors = {
        "source": torch.tensor(list(variants), dtype=torch.int64),
        "image_offsets": offsets_of(variants.values()),
        "caption_offsets": offsets_of(map(len, numbers)),
        "caption_numbers": torch.tensor([*itertools.chain(*numbers)], dtype=torch.int64),
    }
    for name, spec in encoding.record_spec.items():
        rows = [row for _, row in shard.rows] if spec.per == "image" else shard.caption_rows
        blank = torch.zeros(spec.shape, dtype=spec.dtype)
        tensors[name] = torch.stack([row.get(name, blank) for row in rows] or [blank])[: len(rows)]
    return tensors
