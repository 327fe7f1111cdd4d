"""What a source of samples is."""

from typing import Any, Protocol

from PIL import Image


class Refused(Exception):
    """This sample cannot be trained on; the message says why, in a few words."""


class Source(Protocol):
    """Samples by number. `image` and `captions` raise `Refused` for a sample that cannot be used."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a sample in a report."""
        ...

    def captions(self, index: int) -> list[str]: ...

    def image(self, index: int) -> Image.Image:
        """The decoded image in RGB. Called from several threads."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells this data set from another, for the fingerprint of the shards."""
        ...
