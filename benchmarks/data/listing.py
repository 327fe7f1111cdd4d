"""What does listing a folder of images cost a launch? `python -m benchmarks.data.listing [--images 100000] [--json FILE]`

Names and captions of so many images are listed and planned, without opening any, by a process of their own, as the
first of a launch does it, and handed to another one, which reads the captions of one shard of 4,096, as all others do. Given
are seconds, bytes of memory that is a process's own, the most at any time and what stays, and the files that it asks for or
opens; then the same for 10 million images, as all of it grows with them.

Counted before: a name of 21 and a caption of 65 characters, where each ends, a stamp, a count and 64 bytes of plan are 182
bytes in the file; the first asks for every image once, another process for none and opens one file.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
import numpy as np

from benchmarks.tools.question import command_line
from benchmarks.tools.rows import write_result
from engine.data.handed import Handed, hand_over
from engine.data.plan import BLOCK, RUN, known, planned
from engine.data.sources.files import Files
from engine.data.sources.image_folder import ImageFolder

SHARD, WANTED = 4096, 10_000_000


def own_bytes() -> int:
    """Memory that no other process has: neither a file's nor shared."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Counted:
    """What a process does from here on: its seconds, its memory, and what it asks a file system for below a folder."""

    def __init__(self, folder: Path) -> None:
        self.calls: Counter[str] = Counter()
        self.before, self.most, self.started = own_bytes(), most_bytes(), time.perf_counter()
        whole: Any = Files.stat

        def stat(files: Files, name: str) -> tuple[int, int]:
            self.calls["stat"] += 1
            return whole(files, name)

        Files.stat = stat  # type: ignore
        sys.addaudithook(lambda event, values: self._note(event, values, str(folder)))

    def _note(self, event: str, values: tuple[Any, ...], folder: str) -> None:
        if event in ("open", "os.scandir") and str(values[0]).startswith(folder):
            self.calls[event] += 1

    def result(self) -> dict[str, Any]:
        seconds, most = time.perf_counter() - self.started, most_bytes() - self.most
        return {"seconds": seconds, "bytes_at_most": most, "bytes": own_bytes() - self.before,
                **{name: self.calls[name] for name in ("stat", "open", "os.scandir")}}  # fmt: skip


def first(folder: Path, told: Connection) -> None:
    counted = Counted(folder)
    source = ImageFolder(folder / "images", "image", "text")
    stamps, counts = source.stamps()
    plan = planned(known(np.zeros(0, RUN), stamps, counts), np.zeros(0, BLOCK), SHARD)
    plan.counts(plan.blocks)
    handed = hand_over((source, stamps, counts, plan), folder)
    told.send((handed, counted.result()))


def another(folder: Path, handed: Handed, told: Connection) -> None:
    counted = Counted(folder)
    source, _, _, plan = handed.take(folder)
    _, places = plan.samples(plan.blocks[len(plan.blocks) // 2])
    captions = [source.captions(place) for place in places.tolist()]
    told.send(counted.result() | {"captions": len(captions)})


def ask(target: Any, *arguments: Any) -> Any:
    """What a process of its own tells."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, there))
    process.start()
    told = here.recv()
    process.join()
    return told


def write_folder(folder: Path, images: int) -> None:
    """Images of no bytes, a thousand in a folder, with captions in a table."""
    for begin in range(0, images, 1000):
        (folder / f"{begin:08}").mkdir(parents=True)
        for number in range(begin, min(begin + 1000, images)):
            os.mknod(folder / f"{begin:08}" / f"{number:08}.jpg")
    with (folder / "metadata.jsonl").open("w") as table:
        for number in range(images):
            name = f"{number // 1000 * 1000:08}/{number:08}.jpg"
            table.write(f'{{"file_name": "{name}", "text": "a photograph of the thing that has the number {number:012}"}}\n')


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="of the folder (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder / "images", options.images)
        handed, of_first = ask(first, folder)
        of_another = ask(another, folder, handed)
    handed_over = {"bytes_of_the_file": handed.ends[-1], "bytes_told": len(handed.head)}
    scaled = {
        who: {what: round(value / options.images * WANTED) for what, value in found.items() if what != "open"}
        for who, found in (("first", of_first), ("handed_over", {"bytes_of_the_file": handed.ends[-1]}))
    }
    for who, found in (("first", of_first), ("another", of_another), ("handed over", handed_over)):
        print(f"{options.images:,} images, {who}:", ", ".join(f"{what} {value:,.6g}" for what, value in found.items()))
    for who, found in scaled.items():
        print(f"{WANTED:,} images, {who}:", ", ".join(f"{what} {value:,}" for what, value in found.items()))
    write_result(
        options.json, __doc__, images=options.images, first=of_first, another=of_another, handed_over=handed_over, scaled=scaled
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
