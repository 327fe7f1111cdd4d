"""A part of another source."""

from typing import Any

import numpy as np
from PIL import Image

from engine.data.sources.interface import Refused, Source


class Subset:
    """The first `count` samples of another source in a seeded random order, the one `datasets.Dataset.shuffle` takes."""

    def __init__(self, source: Source, count: int, seed: int) -> None:
        self.source, self.count, self.seed = source, count, seed
        self.noticed = source.noticed
        self.indices = np.random.default_rng(seed).permutation(len(source))[:count]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def refusal(self, index: int) -> Refused | None:
        return self.source.refusal(int(self.indices[index]))

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.indices[index]))

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.indices[index]))

    def identity(self) -> dict[str, Any]:
        return self.source.identity() | {"samples": self.count, "sample_seed": self.seed}
