"""A part of another source."""

from typing import Any

import numpy as np
from PIL import Image

from engine.data.sources.interface import Refused, Source, told_apart


class Subset(Source):
    """The samples at some places of another source.

    Args:
        indices: the places, int64 [samples] or all.
        drawn: how they were drawn, as an identity has it; those of all samples by default, or of another subset as that was.
    """

    def __init__(self, source: Source, indices: Any, drawn: dict[str, int] | None = None) -> None:
        self.source, self.indices = source, indices
        self.drawn: dict[str, int] = (source.drawn if isinstance(source, Subset) else {}) if drawn is None else drawn
        self.noticed, self.portable = source.noticed, source.portable

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def refusal(self, index: int) -> Refused | None:
        return self.source.refusal(int(self.indices[index]))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        return self.source.content(int(self.indices[index]))

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(int(self.indices[index]))

    def decode(self, content: bytes) -> Image.Image:
        return self.source.decode(content)

    def mask(self, index: int) -> bytes | None:
        return self.source.mask(int(self.indices[index]))

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        return told_apart(each_stamp(*self.source.stamps())[self.indices]), np.ones(len(self), np.int64)

    def identity(self) -> dict[str, Any]:
        return self.source.identity() | self.drawn


class Prompted(Subset):
    """All samples of a source, each with the same caption."""

    def __init__(self, source: Source, prompt: str) -> None:
        super().__init__(source, range(len(source)))
        self.prompt = prompt

    def captions(self, index: int) -> list[str]:
        return [self.prompt]

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        return self.source.stamps()


class Bucket(Subset):
    """The samples of a source whose images are brought to one size; beside it there are others, so it may come to have none.

    Args:
        listed: the stamps of its samples.
        unmeasured: bool [samples], those whose size could not be read, though it may be at another time: until then nobody
            knows that they belong here.
    """

    def __init__(self, source: Source, indices: np.ndarray, listed: np.ndarray, unmeasured: np.ndarray) -> None:
        super().__init__(source, indices)
        self.portable, self.listed, self.unmeasured = False, listed, unmeasured  # all have the source, once for all buckets

    def content(self, index: int) -> bytes:
        if self.unmeasured[index]:
            raise Refused("unreadable image", "its size could not be read", passing=True)
        return super().content(index)

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        return self.listed, np.ones(len(self), np.int64)

    def identity(self) -> dict[str, Any]:
        return {}  # shards of format version 1 are of one size


def drawn_from(source: Source, count: int, seed: int) -> Subset:
    """The first `count` samples in a seeded random order, the one `datasets.Dataset.shuffle` takes."""
    indices = np.random.default_rng(seed).permutation(len(source))[:count]
    return Subset(source, indices, {"samples": count, "sample_seed": seed})


def each_stamp(stamps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What tells every sample of files from others: uint64 [samples]; equal ones only where files hold samples of one another's
    stamps."""
    begins = np.cumsum(counts) - counts
    return np.repeat(stamps, counts) + (np.arange(counts.sum()) - np.repeat(begins, counts)).astype(np.uint64)
