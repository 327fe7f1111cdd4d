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

import numpy as np
import torch
from torch import Tensor

from engine.config.options import CacheConfig, TrainConfig, options_of
from engine.data.format.index import (
    ENTRY,
    INDEX,
    Index,
    Refusals,
    add_refused,
    count_refused,
    shard_name,
    sweep,
    variants_of,
)
from engine.data.format.shard import Contents, Shard, entry_of, write_shard
from engine.data.identity import differences, identity_of
from engine.data.report import describe_refused, say_refused
from engine.data.sources.decode import refuse_extreme
from engine.data.sources.interface import Refused, Source, refusing
from engine.data.sources.room import room
from engine.errors import UserError
from engine.files import digest_of, excludes_others, lock
from engine.messages import Progress, busy, say
from engine.models.encoder import Encoder, Encoding
from engine.processes import Processes

# So many samples refused by the encoder, before it encoded any, are the encoder's fault.
_HOPELESS = 100
_LONGEST = 10_000  # characters of what is listed of a refused sample, which may quote it


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
    known = ((sample, source.refusal(sample)) for sample in range(len(source)))
    if config.strict:
        for sample, why in known:
            if why:
                raise _strict(source, sample, why)
    elif all(why for _, why in known):
        raise _all_refused(source, ((sample, source.refusal(sample)) for sample in range(len(source))))
    directory.mkdir(parents=True, exist_ok=True)
    with _only_builder(config, processes):
        if processes.from_first((directory / INDEX).exists()):  # built by the run that was waited for
            return _existing_index(directory, identity, fingerprint)
        return _build(config, encoding, source, identity, processes)


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
                sweep(directory)
            waits = processes.from_first(held is None)
            if waits and not said:
                said = True
                say(f"{directory}: another run is building these shards; waiting for its end")
            if waits:
                time.sleep(1)
        yield
        if held is not None and excludes_others(held):
            sweep(directory)
    finally:
        if held is not None:
            os.close(held)


def _build(config: CacheConfig, encoding: Encoding, source: Source, identity: dict[str, Any], processes: Processes) -> Index:
    directory, fingerprint = config.shards_path, digest_of(identity)
    covered = {
        number: range(first, min(first + config.shard_records, len(source)))
        for number, first in enumerate(range(0, len(source), config.shard_records))
        if number % processes.world == processes.rank
    }
    variants = variants_of(identity)

    def is_complete(number: int) -> bool:
        """Whether a shard is there that an earlier build left, of the same samples."""
        try:
            shard = Shard(directory / shard_name(number), encoding.record_spec)
            shard.require_variants(variants)
        except UserError:
            return False
        return (shard.said.fingerprint, shard.covers) == (fingerprint, covered[number]) and not shard.damage()

    missing = {number: samples for number, samples in covered.items() if not is_complete(number)}
    started = time.perf_counter()
    if missing:
        _encode_shards(config, encoding, source, missing, fingerprint, processes)
    seconds = max(processes.gather_objects(time.perf_counter() - started))

    gathered = processes.gather_objects([_describe(directory, number, encoding) for number in covered])
    described = sorted(itertools.chain(*gathered), key=lambda described: described[0])
    refused = add_refused(listed for _, listed in described)
    index = Index(
        family=config.family,
        fingerprint=fingerprint,
        identity=identity,
        config={name: value for name, value in options_of(config).items() if name in CacheConfig.model_fields},
        fields=encoding.record_spec,
        shards=np.array([entry for entry, _ in described], ENTRY),
        refused=refused,
        encode_seconds=seconds,
    )
    if not index.records:
        for number in covered:
            (directory / shard_name(number)).unlink(missing_ok=True)
        raise UserError(_none_usable(refused))
    if processes.is_first:
        index.write(directory)
    processes.barrier()
    for noticed, count in sum(processes.gather_objects(source.noticed), Counter()).items():
        say(f"{count} of {len(source)} images: {noticed}")
    say_refused(len(source), refused, directory)
    return index


def _describe(directory: Path, number: int, encoding: Encoding) -> tuple[tuple, dict[str, Refusals]]:
    """What the index says of a shard, and the samples refused there."""
    shard = Shard(directory / shard_name(number), encoding.record_spec)
    return entry_of(shard, number), count_refused(shard.refused)


def _strict(source: Source, sample: int, why: Refused) -> UserError:
    return UserError(f"--strict: {source.name(sample)}: {why}", alone=True)


def _all_refused(source: Source, refused: Iterable[tuple[int, Refused | None]], alone: bool = False) -> UserError:
    counted = count_refused(_listed(source, sample, why) for sample, why in refused if why)
    return UserError(_none_usable(counted), alone=alone)


def _none_usable(refused: dict[str, Refusals]) -> str:
    return f"not one of {sum(of.count for of in refused.values())} samples can be used: {describe_refused(refused)}"


def _listed(source: Source, sample: int, why: Refused) -> dict[str, str]:
    """A refused sample as its shard lists it."""
    values = {"source": source.name(sample), "reason": why.reason} | ({"detail": why.detail} if why.detail else {})
    # Names of files are bytes, not text.
    return {key: value[:_LONGEST].encode(errors="backslashreplace").decode() for key, value in values.items()}


def _existing_index(directory: Path, identity: dict[str, Any], fingerprint: str) -> Index:
    index = Index.read(directory)
    if index.fingerprint != fingerprint:
        changed = differences(index.identity, identity) or "another format"
        raise UserError(
            f"{directory}: the shards there were built otherwise ({changed}); give the same options, name another "
            f"--shards_dir, give no data options to train on these, or delete {directory / INDEX} to build them again"
        )
    return index


Item = TypeVar("Item")
Row = dict[str, Tensor]


@dataclass
class Encoded:
    """What became of one shard's samples and captions.

    captions: of each sample that has any, their texts; of records in the end, those that the encoder took.
    rows: of the samples that became records, in order, one image row for every variant.
    refused: sample -> why it did not.
    texts: text -> its caption row's number, distinct and in order of first appearance in the records.
    caption_rows: one for each.
    """

    captions: dict[int, list[str]] = field(default_factory=dict)
    rows: dict[int, list[Row]] = field(default_factory=dict)
    refused: dict[int, Refused] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    caption_rows: list[Row] = field(default_factory=list)


def _encode_shards(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    covered: dict[int, range],
    fingerprint: str,
    processes: Processes,
) -> None:
    """Encodes and writes the shards with these numbers, of these samples."""
    with (
        encoding.encoder(processes.device) as encoder,
        concurrent.futures.ThreadPoolExecutor(max(config.dataloader_num_workers, 1)) as pool,
        Progress(sum(map(len, covered.values())), "Encoding", "image") as progress,
    ):
        encoded = 0
        failed: list[tuple[int, Refused]] = []
        for number, samples in covered.items():
            shard = Encoded()
            _read_captions(encoding, source, samples, shard)
            prepared = _prepare(config, encoding, source, shard, samples, pool)
            failed += _encode_images(config, encoder, prepared, shard, progress)
            encoded += len(shard.rows)
            _encode_captions(config, encoder, shard)
            if config.strict and shard.refused:
                raise _strict(source, *min(shard.refused.items(), key=lambda item: item[0]))
            if not encoded and len(failed) >= _HOPELESS:
                raise _all_refused(source, failed, alone=True)
            contents = Contents(
                covers=samples,
                sources=[*shard.rows],
                names=[source.name(sample) for sample in shard.rows],
                variants=[len(rows) for rows in shard.rows.values()],
                captions=[[shard.texts[text] for text in shard.captions[sample]] for sample in shard.rows],
                texts=[*shard.texts],
                refused=[_listed(source, sample, shard.refused[sample]) for sample in samples if sample in shard.refused],
            )
            write_shard(config.shards_path / shard_name(number), _stacked(shard, encoding), contents, fingerprint)


def _read_captions(encoding: Encoding, source: Source, samples: range, shard: Encoded) -> None:
    """Finds the captions of samples, or why they have none that can be used."""
    for sample in samples:
        try:
            with refusing("unreadable caption"):
                shard.captions[sample] = source.captions(sample) if encoding.captioned else []
        except Refused as why:
            shard.refused[sample] = Refused(why.reason, why.detail)


# A sample with its decoded and transformed variants, or with the reason why there are none.
Prepared = tuple[int, list[dict[str, Tensor]] | Refused]


def _prepare(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    shard: Encoded,
    samples: range,
    pool: concurrent.futures.ThreadPoolExecutor,
) -> Iterator[Prepared]:
    """Samples whose captions are known, decoded and transformed, in order; a bounded number are in flight."""

    def prepare(sample: int) -> Prepared:
        if sample in shard.refused:
            return sample, shard.refused[sample]
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

    failed: dict[int, Refused] = {}
    for (sample, _), row in _encode_in_batches(variants(), config.encode_batch_size, encode, "image"):
        if isinstance(row, Refused):
            failed[sample] = row
        else:
            shard.rows.setdefault(sample, []).append(row)
    shard.refused |= failed
    for sample in failed:
        shard.rows.pop(sample, None)
    return list(failed.items())


def _encode_captions(config: CacheConfig, encoder: Encoder, shard: Encoded) -> None:
    """Encodes the captions of the records, each text once. What the encoder refuses is taken from them; a record that is left
    without a caption is refused."""
    texts = dict.fromkeys(text for sample in shard.rows for text in shard.captions[sample])
    unusable: dict[str, Refused] = {}
    for text, row in _encode_in_batches(texts, config.encode_batch_size, encoder.encode_captions, "caption"):
        if isinstance(row, Refused):
            unusable[text] = Refused(row.reason, f"{row.detail} (caption {text[:60]!r})")
        else:
            shard.texts[text] = len(shard.caption_rows)
            shard.caption_rows.append(row)
    for sample in list(shard.rows) if unusable else ():
        given = shard.captions[sample]
        shard.captions[sample] = [text for text in given if text not in unusable]
        if not shard.captions[sample]:
            shard.refused[sample] = unusable[given[0]]
            del shard.rows[sample]


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


def _stacked(shard: Encoded, encoding: Encoding) -> dict[str, Tensor]:
    """The rows of every field."""
    stacked = {}
    for name, spec in encoding.record_spec.items():
        rows = itertools.chain(*shard.rows.values()) if spec.per == "image" else shard.caption_rows
        found = [row[name] for row in rows]
        stacked[name] = torch.stack(found) if found else torch.empty(0, *spec.shape, dtype=spec.dtype)
    return stacked
