"""A part of another source."""

from typing import Any

import numpy as np
from PIL import Image

from engine.data.sources.interface import Refused, Source, told_apart


class Subset(Source):
    """The first `count` samples of another source in a seeded random order, the one `datasets.Dataset.shuffle` takes."""

    def __init__(self, source: Source, count: int, seed: int) -> None:
        self.source, self.count, self.seed = source, count, seed
        self.noticed, self.portable = source.noticed, source.portable
        self.indices = np.random.default_rng(seed).permutation(len(source))[:count]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def refusal(self, index: int) -> Refused | None:
        return self.source.refusal(int(self.indices[index]))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        return self.source.content(int(self.indices[index]))

    def decode(self, content: bytes) -> Image.Image:
        return self.source.decode(content)

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        stamps, counts = self.source.stamps()
        ends = np.cumsum(counts)
        files = np.searchsorted(ends, self.indices, side="right")
        within = self.indices - (ends - counts)[files]
        return told_apart(stamps[files] + within.astype(np.uint64)), np.ones(self.count, np.int64)

    def identity(self) -> dict[str, Any]:
        return self.source.identity() | {"samples": self.count, "sample_seed": self.seed}
