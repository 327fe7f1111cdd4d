"""What do kills cost those who write shards? `python -m benchmarks.data.kills [--trials NAME ...] [--every 1] [--json FILE]`

Shards are built, built again after the data set gained an image, lost one and has another one changed, and converted from
version 1, in their directory and into another. Each is killed with SIGKILL at every operation that alters a file or a
directory. What is there then must be whole: what was there before, or what was to come. The same command, started again, must
end in the very files of one that nobody disturbed, and leave nothing unfinished behind.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.place import Place
from benchmarks.tools.rows import write_result
from benchmarks.tools.shards import write_version_1
from benchmarks.tools.storage import NONE, Fault, FaultyRuns, instants
from engine.data.format.index import INDEX, Index
from engine.data.format.verify import verify
from engine.files import digest
from engine.messages import Progress

TRIALS = ["building", "growing", "converting", "converting elsewhere"]


def build(place: Place, images: Path, shards: Path) -> list[str]:
    """What follows `python -m`."""
    return [
        "engine.shards", "build", "--family", "sd", "--pretrained_model_name_or_path", place.model, "--train_data_dir",
        str(images), "--resolution", "16", "--center_crop", "--shard_records", "4", "--shards_dir", str(shards),
    ]  # fmt: skip


def withhold(images: Path) -> Callable[[], None]:
    """Takes the last image from a data set; returns what gives it back, takes the first and makes the second another."""
    metadata = images / "metadata.jsonl"
    lines = metadata.read_text().splitlines(keepends=True)
    first, second, third, *_, last = sorted(images.glob("*.jpg"))
    kept = last.read_bytes()
    last.unlink()
    metadata.write_text("".join(lines[:-1]))

    def change() -> None:
        last.write_bytes(kept)
        first.unlink()
        second.write_bytes(third.read_bytes())
        metadata.write_text("".join(lines[1:]))

    return change


def problem(shards: Path) -> str:
    """What is wrong with shards of either version; empty where all is well, or where there is no index yet."""
    if not (shards / INDEX).exists():
        return ""
    value = json.loads((shards / INDEX).read_text())
    if value["format_version"] == 1:
        altered = [entry["file"] for entry in value["shards"] if digest(shards / entry["file"]) != entry["sha256"]]
        return f"{altered[0]} is not what it was" if altered else ""
    index = Index.read(shards)
    return "; ".join(verify(shards, index, range(len(index.shards)), rows=True).values())


def contents(directory: Path) -> dict[str, Any]:
    """Every file by its path; of an index what is the same in all runs."""
    found: dict[str, Any] = {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    for name in [name for name in found if name.endswith(INDEX)]:
        found[name] = json.loads(found[name]) | {"encode_seconds": 0}
    return found


class Trial:
    """One way of writing shards, undisturbed; and others that are compared with it.

    before: the directory as it is before the command.
    """

    def __init__(self, place: Place, runs: FaultyRuns, name: str) -> None:
        self.runs, self.disk = runs, place.root / "disk"
        shards = self.disk / "shards"
        self.before = place.root / f"before {name}"
        self.before.mkdir()
        images = Path(shutil.copytree(place.images, place.root / f"images {name}"))
        self.command = build(place, images, shards)
        if name == "growing":
            change = withhold(images)
            self.build(build(place, images, self.before / "shards"))
            change()
        elif name != "building":
            self.build(build(place, images, place.root / f"built {name}"))
            write_version_1(place.root / f"built {name}", self.before / "shards")
            elsewhere = ["--output", str(self.disk / "new")] if "elsewhere" in name else []
            self.command = ["engine.shards", "convert", str(shards), *elsewhere]
        self.begin()
        ended = runs.run(self.command, self.disk, Fault("changes"))
        assert ended.status == 0, ended.said
        self.operations, self.expected = ended.operations, contents(self.disk)

    def build(self, command: list[str]) -> None:
        ended = self.runs.run(command, self.disk, NONE)
        assert ended.status == 0, ended.said

    def begin(self) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        shutil.copytree(self.before, self.disk)

    def meet(self, at: int) -> str:
        """What is wrong after a kill at an operation, or after the same command again; empty where all is well."""
        self.begin()
        ended = self.runs.run(self.command, self.disk, Fault("changes", at, "kill"))
        if ended.status not in (-9, 0):
            return f"ended with {ended.status}: {ended.said[-500:]}"
        for name in ("shards", "new"):
            if wrong := problem(self.disk / name):
                return f"left {name} damaged: {wrong}"
        again = self.runs.run(self.command, self.disk, NONE)
        if again.status != 0:
            return f"cannot be started again: {again.said[-500:]}"
        found = contents(self.disk)
        different = [name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)]
        return f"ended in other files: {', '.join(sorted(different))}" if different else ""


def sweep(trial: Trial, name: str, every: int) -> dict[str, Any]:
    """Kills at every `every`-th instant."""
    wrong: list[dict[str, Any]] = []
    chosen = instants(trial.operations)[::every]
    with Progress(len(chosen), name, "kill") as progress:
        for at in chosen:
            if said := trial.meet(at):
                wrong.append({"at": at, "operation": Path(trial.operations[at - 1][1]).name, "wrong": said})
            progress.update()
    return {"trial": name, "kills": len(chosen), "operations": dict(Counter(of[0] for of in trial.operations)), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.data.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=TRIALS, help="default: all")
    parser.add_argument("--every", type=int, default=1, help="take each so many-th instant (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, FaultyRuns() as runs:
        place = Place(Path(directory))
        rows = [sweep(Trial(place, runs, name), name, options.every) for name in options.trials]
    for row in rows:
        print(f"{row['trial']}: {row['kills']} kills, {len(row['wrong'])} not well")
        for result in row["wrong"]:
            print(f"  {result['operation']}: {result['wrong']}")
    write_result(options.json, __doc__, trials=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
