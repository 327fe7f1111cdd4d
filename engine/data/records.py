"""From samples to the records of one shard: read, decoded, transformed and encoded, with decoding threads.

Whatever a sample raises on that way refuses that sample and no other.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.config.options import CacheConfig
from engine.data.captions import texts_of
from engine.data.format.index import CONTENT, UNKNOWN, Refusals, count_refused
from engine.data.format.shard import Contents
from engine.data.report import describe_refused
from engine.data.sources.decode import decode_mask, refuse_extreme
from engine.data.sources.interface import Refused, Source, refusing
from engine.data.sources.room import room
from engine.errors import UserError
from engine.models.encoder import Encoder, Encoding

# So many samples refused by the encoder, before it encoded any, are the encoder's fault.
_HOPELESS = 100
WHITE = 255  # of a mask: trained
_LONGEST = 10_000  # characters of what is listed of a refused sample, which may quote it


Item = TypeVar("Item")
Row = dict[str, Tensor]


@dataclass
class Encoded:
    """What became of one shard's samples, by their numbers, and captions.

    captions: of each sample that has any, their texts; of records in the end, those that the encoder took.
    rows: of the samples that became records, in order, one image row for every variant.
    refused: sample -> why it did not.
    contents: of every sample, a digest of its content; `UNKNOWN` of those that were refused for what may be over.
    texts: text -> its caption row's number, distinct and in order of first appearance in the records.
    caption_rows: one for each.
    """

    captions: dict[int, list[str]] = field(default_factory=dict)
    rows: dict[int, list[Row]] = field(default_factory=dict)
    refused: dict[int, Refused] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    caption_rows: list[Row] = field(default_factory=list)


@dataclass
class Outcome:
    """What became of samples over all shards of a process.

    encoded: how many became records.
    failed: those that the encoder refused, by their places in the source.
    """

    encoded: int = 0
    failed: list[tuple[int, Refused]] = field(default_factory=list)


def encode_shard(
    config: CacheConfig,
    encoding: Encoding,
    encoder: Encoder,
    source: Source,
    covers: range,
    samples: dict[int, int],
    pool: concurrent.futures.ThreadPoolExecutor,
    outcome: Outcome,
    done: Callable[[], None],
) -> tuple[dict[str, Tensor], Contents]:
    """The rows of every field of one shard, and what else is written into it.

    Args:
        covers: the numbers that the shard covers.
        samples: of those that the source has, the number and the place in it, in order.
        outcome: is added to.
        done: is called for every sample that was read.
    """
    shard = Encoded()
    prepared = _prepare(config, encoding, source, shard, samples, pool)
    failed = _encode_images(config, encoder, prepared, shard, done)
    outcome.failed += [(samples[number], why) for number, why in failed]
    outcome.encoded += len(shard.rows)
    _encode_captions(config, encoding, encoder, shard)
    if config.strict and shard.refused:
        number, why = min(shard.refused.items(), key=lambda item: item[0])
        raise strict(source, samples[number], why)
    if not outcome.encoded and len(outcome.failed) >= _HOPELESS:
        raise all_refused(source, outcome.failed, alone=True)
    contents = np.zeros([len(covers), CONTENT], np.uint8)
    for number, digest in shard.contents.items():
        contents[number - covers.start] = np.frombuffer(digest, np.uint8)
    return _stacked(shard, encoding), Contents(
        covers=covers,
        sources=[*shard.rows],
        names=[source.name(samples[number]) for number in shard.rows],
        variants=[len(rows) for rows in shard.rows.values()],
        captions=[[shard.texts[text] for text in shard.captions[number]] for number in shard.rows],
        texts=[*shard.texts],
        refused=[listed(source, samples[number], shard.refused[number]) for number in samples if number in shard.refused],
        contents=contents,
    )


def strict(source: Source, place: int, why: Refused) -> UserError:
    return UserError(f"--strict: {source.name(place)}: {why}", alone=True)


def all_refused(source: Source, refused: Iterable[tuple[int, Refused | None]], alone: bool = False) -> UserError:
    counted = count_refused(listed(source, place, why) for place, why in refused if why)
    return UserError(none_usable(counted), alone=alone)


def none_usable(refused: dict[str, Refusals]) -> str:
    return f"not one of {sum(of.count for of in refused.values())} samples can be used: {describe_refused(refused)}"


def listed(source: Source, place: int, why: Refused) -> dict[str, str]:
    """A refused sample as its shard lists it."""
    values = {"source": source.name(place), "reason": why.reason} | ({"detail": why.detail} if why.detail else {})
    # Names of files are bytes, not text.
    return {key: value[:_LONGEST].encode(errors="backslashreplace").decode() for key, value in values.items()}


@dataclass
class Read:
    """A sample as its source holds it.

    captions: none where its family trains on none.
    image: as it is stored; None where it was not read.
    mask: as it is stored; None where there is none.
    refused: why the sample cannot be used, as far as that was seen.
    content: a digest that tells it from others.
    """

    captions: list[str] | None
    image: bytes | None
    mask: bytes | None
    refused: Refused | None
    content: bytes


def read_sample(source: Source, place: int, captioned: bool, masked: bool) -> Read:
    captions, image, mask, refused = None, None, None, None
    try:
        with refusing("unreadable caption"):
            captions = source.captions(place) if captioned else []
        with refusing("unreadable image"):
            image = source.content(place)
        with _of_the_mask():
            mask = source.mask(place) if masked else None
    except Refused as why:
        refused = Refused(why.reason, why.detail, why.passing)  # `why` itself holds the frames with the image
    told = hashlib.sha256(image).hexdigest() if image is not None else (source.name(place), str(refused))
    parts = [captions, told] if mask is None else [captions, told, hashlib.sha256(mask).hexdigest()]
    content = hashlib.sha256(json.dumps(parts).encode()).digest()[:CONTENT]
    return Read(captions, image, mask, refused, content)


@contextlib.contextmanager
def _of_the_mask() -> Iterator[None]:
    try:
        with refusing("unreadable image"):
            yield
    except Refused as why:
        raise Refused(f"mask: {why.reason}", why.detail, why.passing) from None


def _decoded(source: Source, read: Read) -> tuple[Image.Image, Image.Image | None]:
    """The image in RGB and, if there is one, its mask in grey, of the same size."""
    assert read.image is not None
    with refusing("unreadable image"):
        image = source.decode(read.image)
    if read.mask is None:
        return image, None
    with _of_the_mask():
        return image, decode_mask(read.mask, image.size)


def still_refused(source: Source, read: Read) -> bool:
    """Whether a sample that was refused for what may be over is so now."""
    if read.refused:
        return read.refused.passing
    try:
        with room.turn():
            _decoded(source, read)
    except Refused as why:
        return why.passing
    return False


# The number of a sample with its decoded and transformed variants, or with the reason why there are none.
Prepared = tuple[int, list[dict[str, Tensor]] | Refused]


def _prepare(
    config: CacheConfig,
    encoding: Encoding,
    source: Source,
    shard: Encoded,
    samples: dict[int, int],
    pool: concurrent.futures.ThreadPoolExecutor,
) -> Iterator[Prepared]:
    """Samples, read, decoded and transformed, in order; a bounded number are in flight."""

    def prepare(number: int) -> Prepared:
        with room.turn():
            made = make(number)
        if isinstance(made, Refused) and made.passing:
            shard.contents[number] = UNKNOWN
        if config.strict and isinstance(made, Refused):
            raise strict(source, samples[number], made)
        return number, made

    def make(number: int) -> list[dict[str, Tensor]] | Refused:
        read = read_sample(source, samples[number], encoding.captioned, config.mask_column is not None)
        shard.contents[number] = read.content
        if read.captions is not None:
            shard.captions[number] = [text for caption in read.captions for text in texts_of(config, caption)]
        if read.refused:
            return read.refused
        try:
            image, mask = _decoded(source, read)
            refuse_extreme(image.size, encoding.size, config.max_upscale)
            with refusing("image cannot be transformed"):
                variants = encoding.prepare(image, number)
                if config.mask_column:
                    masks = encoding.prepare_mask(mask or Image.new("L", image.size, WHITE), number)
                    variants = [variant | of_it for variant, of_it in zip(variants, masks, strict=True)]
                return variants
        except Refused as why:
            return Refused(why.reason, why.detail, why.passing)

    if config.dataloader_num_workers == 0:
        yield from map(prepare, samples)
        return
    ahead = 2 * config.encode_batch_size + config.dataloader_num_workers
    futures: deque[concurrent.futures.Future[Prepared]] = deque()
    for number in samples:
        futures.append(pool.submit(prepare, number))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _encode_images(
    config: CacheConfig, encoder: Encoder, prepared: Iterable[Prepared], shard: Encoded, done: Callable[[], None]
) -> list[tuple[int, Refused]]:
    """Encodes the samples of a shard; a sample of which one variant fails is refused as a whole.

    Returns: those that the encoder refused.
    """

    def variants() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for sample, result in prepared:
            done()
            if isinstance(result, Refused):
                shard.refused[sample] = result
            else:
                yield from ((sample, variant) for variant in result)

    def encode(batch: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
        inputs = {name: torch.stack([image[name] for _, image in batch]) for name in batch[0][1]}
        masks = {name: inputs.pop(name) for name in ("mask",) if config.mask_column}
        return encoder.encode_images(inputs) | masks

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


def _encode_captions(config: CacheConfig, encoding: Encoding, encoder: Encoder, shard: Encoded) -> None:
    """Encodes the captions of the records, each text once. What the encoder refuses is taken from them; a record that is left
    without a caption is refused."""
    texts = dict.fromkeys(text for sample in shard.rows for text in shard.captions[sample])
    unusable: dict[str, Refused] = {}
    for text, row in _encode_in_batches(texts, config.encode_batch_size, encoder.encode_captions, "caption"):
        if isinstance(row, Refused):
            unusable[text] = Refused(row.reason, f"{row.detail} (caption {text[:60]!r})")
        else:
            shard.texts[text] = len(shard.caption_rows)
            shard.caption_rows.append({name: rows for name, rows in row.items() if name in encoding.record_spec})
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
