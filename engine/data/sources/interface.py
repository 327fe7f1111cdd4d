"""What a source of samples is, and how a sample is refused."""

import contextlib
import errno
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from engine.errors import OF_THE_FILE, UserError, first_line, out_of_memory, system_number

_ODD = 0x9E3779B97F4A7C15  # whose multiples are spread over 64 bits


class Refused(Exception):
    """This sample cannot be trained on.

    reason: why, in a few words without names or numbers, so that equal reasons add up.
    detail: what is particular to this sample.
    passing: whether it may be over at another time, because the fault is not the sample's.
    """

    def __init__(self, reason: str, detail: str = "", passing: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.passing = reason, detail, passing

    def __reduce__(self) -> tuple[type["Refused"], tuple[str, str, bool]]:
        return Refused, (self.reason, self.detail, self.passing)


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
        number = system_number(error)
        passing = out_of_memory(error) or (number is not None and number not in OF_THE_FILE)
        raise Refused(reason, f"{type(error).__name__}: {first_line(error)[:200]}", passing) from error


def is_address(path: str) -> bool:
    """Whether what stands where a path should be is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]+://|data:", path, re.IGNORECASE) is not None


class Source(Protocol):
    """Samples by their places. `content` and `captions` raise `Refused` for a sample that cannot be used.

    noticed: what was decided about images that were read, and for how many.
    portable: whether another process can be handed it, as `engine/data/handed.py` does, without listing anything again.
    """

    noticed: Counter[str]
    portable: bool = False

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a sample in a report."""
        ...

    def refusal(self, index: int) -> Refused | None:
        """Why a sample cannot be used, as far as that is known without reading it."""
        ...

    def captions(self, index: int) -> list[str]: ...

    def content(self, index: int) -> bytes:
        """The image as it is stored. Called from several threads, as `decode` is."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of the image as `decode` gives it, by its header. Called from several threads.

        Raises:
            Refused: the header cannot be read.
        """
        ...

    def decode(self, content: bytes) -> Image.Image:
        """The image in RGB."""
        ...

    def mask(self, index: int) -> bytes | None:
        """The mask of an image as it is stored; None where there is none. Called from several threads, too."""
        return None

    def stamps(self) -> tuple[np.ndarray, np.ndarray]:
        """What tells the files of the samples from others without reading them, by name, size and time of change: uint64
        [files], each another; and how many samples lie in each, one after another: int64 [files]."""
        ...

    def identity(self) -> dict[str, Any]:
        """What told this data set from another where nobody computed digests of contents: in shards of format version 1."""
        ...


def stamp_of(*values: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(values).encode(errors="surrogatepass")).digest()[:8])


def told_apart(stamps: Sequence[int] | np.ndarray) -> np.ndarray:
    """Stamps of which each is another: equal ones are told apart by their order."""
    found = np.array(stamps, np.uint64)
    order = np.argsort(found, kind="stable")
    inordered = found[order]
    begins = np.flatnonzero(np.append(True, inordered[1:] != inordered[:-1])) if len(found) else np.empty(0, np.int64)
    repeats = np.arange(len(found)) - np.repeat(begins, np.diff(np.append(begins, len(found))))
    found[order] += repeats.astype(np.uint64) * np.uint64(_ODD)
    return found
