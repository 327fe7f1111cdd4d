"""What a source of samples is, and how a sample is refused."""

import contextlib
import errno
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from PIL import Image

from engine.errors import UserError, first_line


class Refused(Exception):
    """This sample cannot be trained on.

    reason: why, in a few words without names or numbers, so that equal reasons add up.
    detail: what is particular to this sample.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# After these the device does nothing right any more, for no sample.
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)


@contextlib.contextmanager
def refusing(reason: str) -> Iterator[None]:
    """Turns whatever a sample raises into `Refused`, but not what is the disk's, the device's or the user's fault.

    Libraries in Rust raise their panics past `Exception`.
    """
    try:
        yield
    except (Refused, UserError, *_OF_THE_DEVICE):
        raise
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise Refused(reason, f"{type(error).__name__}: {first_line(error)[:200]}") from error


def is_address(path: str) -> bool:
    """Whether what stands where a path should be is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]+://|data:", path, re.IGNORECASE) is not None


class Source(Protocol):
    """Samples by number. `image` and `captions` raise `Refused` for a sample that cannot be used.

    noticed: what was decided about images that were read, and for how many.
    """

    noticed: Counter[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a sample in a report."""
        ...

    def refusal(self, index: int) -> Refused | None:
        """Why a sample cannot be used, as far as that is known without reading it."""
        ...

    def captions(self, index: int) -> list[str]: ...

    def image(self, index: int) -> Image.Image:
        """The decoded image in RGB. Called from several threads."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells this data set from another, for the fingerprint of the shards."""
        ...
