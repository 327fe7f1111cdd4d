"""Samples of a folder in a few arrays: a hundred bytes each, where Python's objects take several hundred."""

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.sources.interface import Refused


@dataclass(slots=True)
class Sample:
    """An image by its name, with its caption as it stands in the table, or with the reason why it is none; and its mask's."""

    name: str
    caption: Any = None
    refused: Refused | None = None
    mask: str | None = None


class Texts:
    """Texts one after another: uint8 [bytes], and where each ends: int64 [texts]."""

    def __init__(self, texts: Iterable[str]) -> None:
        content, ends = bytearray(), array("q")
        for text in texts:
            content += text.encode(errors="surrogatepass")  # names of files are bytes, not text
            ends.append(len(content))
        self.content, self.ends = np.frombuffer(content, np.uint8), np.frombuffer(ends, np.int64)

    def __getitem__(self, place: int) -> str:
        begin = self.ends[place - 1] if place else 0
        return self.content[begin : self.ends[place]].tobytes().decode(errors="surrogatepass")


class Samples:
    """Samples as they were, each made again when it is asked for. What no JSON can hold is kept as it is."""

    def __init__(self, samples: list[Sample]) -> None:
        self.length = len(samples)
        self.names = Texts(sample.name for sample in samples)
        self.captions = Texts(
            json.dumps(sample.caption, ensure_ascii=False) if _is_text(sample.caption) else "" for sample in samples
        )
        self.others = {place: sample.caption for place, sample in enumerate(samples) if not _is_text(sample.caption)}
        self.masks = Texts(sample.mask or "" for sample in samples) if any(sample.mask for sample in samples) else None
        self.refused = {place: sample.refused for place, sample in enumerate(samples) if sample.refused}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Sample:
        caption = self.others[place] if place in self.others else json.loads(self.captions[place])
        mask = self.masks[place] or None if self.masks else None
        return Sample(self.names[place], caption, self.refused.get(place), mask)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(self.length))


def _is_text(caption: Any) -> bool:
    """Whether a caption is nothing, a text or a list of texts."""
    return caption is None or type(caption) is str or (type(caption) is list and all(type(text) is str for text in caption))
