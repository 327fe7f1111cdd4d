"""What the first process hands to all others of its launch: objects, whose arrays all map from one file beside the shards.

The objects travel among the processes and carry what the file is called, so that no file is run as a program. Ten
million images with captions are some 1.8 GB, once on the disk and once in the memory of a node, whatever processes it has.
"""

import io
import mmap
import os
import pickle
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.format.index import HANDED
from engine.files import PARTIAL, open_regular, seen, unseen

_ALIGNED = 64


class _Pickler(pickle.Pickler):
    """Makes other locks of locks, which are free."""

    def reducer_override(self, value: Any) -> Any:
        return (threading.Lock, ()) if isinstance(value, type(threading.Lock())) else NotImplemented


@dataclass(frozen=True)
class Handed:
    """What tells a process how to take what it is handed.

    ends: where each array ends in the file; it begins at the next multiple of 64 after the one before it.
    """

    name: str
    ends: list[int]
    head: bytes

    def take(self, directory: Path) -> Any:
        """The objects, as soon as this node sees the file; their arrays cannot be written.

        Raises:
            UserError: it does not in time.
        """
        size, path = (self.ends or [0])[-1], directory / self.name
        if not seen(path, lambda: path.stat().st_size == size):
            raise unseen(path)
        with open_regular(path) as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        begins = [0, *(-(-end // _ALIGNED) * _ALIGNED for end in self.ends)]
        return pickle.loads(self.head, buffers=[content[begin:end] for begin, end in zip(begins, self.ends, strict=False)])


def hand_over(value: Any, directory: Path) -> Handed:
    """Writes the arrays of objects to a file of a directory."""
    arrays: list[pickle.PickleBuffer] = []
    head, ends = io.BytesIO(), list[int]()
    _Pickler(head, protocol=5, buffer_callback=arrays.append).dump(value)
    name = f"{HANDED}{secrets.token_hex(4)}{PARTIAL}"  # which is swept, should this process be killed
    try:
        with (directory / name).open("xb") as file:
            for array in arrays:
                file.write(bytes(-file.tell() % _ALIGNED))
                file.write(array.raw())
                ends.append(file.tell())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # half a file would keep a full disk full
        (directory / name).unlink(missing_ok=True)
        raise
    return Handed(name, ends, head.getvalue())
