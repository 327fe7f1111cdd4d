"""Memory for images while they are decoded and made ready, over all threads: a large one waits for its turn."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

ROOM = 4 * 2**30  # bytes: a photograph of 24 megapixels on each of 14 threads, or one image as large as any that is decoded
LARGE = 2**28  # bytes


class Room:
    """So many bytes that threads take and give back."""

    def __init__(self, size: int) -> None:
        self.size = self.left = size
        self._changed = threading.Condition()
        self._mine = threading.local()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """What this thread takes within is given back at the end of its outermost turn, when none of it is in use any more."""
        if hasattr(self._mine, "taken"):
            yield
            return
        self._mine.taken = 0
        try:
            yield
        finally:
            self._give_back()
            del self._mine.taken

    def take(self, count: int) -> None:
        """Waits until this thread has `count` bytes in all; one that asks for more than there are gets all of them."""
        count = min(count, self.size)
        if count > self._mine.taken:
            self._give_back()  # who held some while waiting for more could wait for one that does the same
            with self._changed:
                self._changed.wait_for(lambda: self.left >= count)
                self.left -= count
                self._mine.taken = count

    def _give_back(self) -> None:
        if self._mine.taken > LARGE and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)  # glibc keeps what a thread freed for that thread, in pieces too small to be mapped on their own
        with self._changed:
            self.left += self._mine.taken
            self._mine.taken = 0
            self._changed.notify_all()


room = Room(ROOM)
