"""How fast are the engine's shards beside MDS, WebDataset and litdata? `python -m benchmarks.data [--json FILE]`

    python -m benchmarks.data --peers_python PYTHON     # one that has them; else they are installed aside, for the while
    python -m benchmarks.data --simulate RECORDS        # instead: an index of so many records is opened and drawn from

The same random records are written in each format: of Stable Diffusion (64 KiB of latents, 115.5 KiB of text states) and of the
Kandinsky prior without its states (5 KiB). Every side is measured in a process of its own, in turns, and keeps the median of
the rounds; of the peers with 0 and with 2 workers, whichever is better in a figure. The figures:

- open_seconds, first_batch_seconds: from nothing to the data set, and to the first batch, imports done and files in the cache.
- memory_mib: held by the process and its workers after that and some reading; pages of files do not count.
- warm_B: samples per second in batches of B, where the files lie in the page cache; after the first batch.
- cold_B: the same over an epoch from its first batch on, where nothing lies there yet.
- http_B, http_first_batch_seconds: the same from nginx on this machine, with those that read over HTTP.
- resume_seconds: from nothing to the first batch in the middle of an epoch.
- processor_microseconds_B: over all processes per sample, warm. What checksums cost is the difference of two sides.

`simulated` rows say what `--simulate` does. Peers read whole chunks one after another, or nearly so, and shuffle within them;
the engine's order of all records reads each from anywhere, `blocks` from two shards at a time.
"""

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tools import formats
from benchmarks.tools.nginx import nginx, served_by_nginx
from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.simulated import simulate
from benchmarks.tools.tables import problem

RECORDS = {"sd": 4096, "prior": 16_384}
SIZES, WORKERS, WINDOW_SECONDS = [16, 64, 256], (0, 2), 1.0
SIMULATED = (1000, 10**8, 10**9)
PEERS = ["torch==2.13.0", "mosaicml-streaming==0.13.0", "webdataset==1.0.2", "litdata==0.2.76"]
SECONDS = 25  # that a side takes once


def install(directory: Path) -> Path:
    """Makes an environment of the peers; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
    return python


def ask(python: Path, work: str, side: str, kind: str, directory: Path, *more: Any) -> str:
    """What `formats.py` prints.

    Raises:
        RuntimeError: the end of what it said, where it failed.
    """
    command = [python, formats.__file__, work, side, kind, directory / f"{kind}-{folder_of(side)}", *more]
    environment = os.environ | {"PYTHONPATH": str(Path(formats.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def folder_of(side: str) -> str:
    return side.partition(",")[0]


def compare(kind: str, records: int, rounds: int, pythons: dict[str, Path]) -> dict[str, Any]:
    """Of every side the median of each figure over the rounds, and with how many workers."""
    ways = {side: WORKERS if side in formats.PEERS else (0,) for side in pythons}
    said: dict[str, dict[int, list[dict[str, float]]]] = {side: {workers: [] for workers in of} for side, of in ways.items()}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for side in {folder_of(side): side for side in pythons}.values():
            ask(pythons[side], "write", side, kind, directory, records)
        with served_by_nginx(directory) if nginx() else contextlib.nullcontext() as address:
            turns = [(side, workers) for side, of in ways.items() for workers in of]
            for turn in range(rounds):
                for side, workers in random.Random(turn).sample(turns, len(turns)):
                    more = [records, "--workers", workers, "--seconds", WINDOW_SECONDS, "--sizes", *SIZES]
                    figures = json.loads(ask(pythons[side], "measure", side, kind, directory, *more))
                    if address and hasattr(formats.SIDES[side], "open_served"):
                        more += ["--address", f"{address}/{kind}-{folder_of(side)}"]
                        figures |= json.loads(ask(pythons[side], "measure", side, kind, directory, *more))
                    said[side][workers].append(figures)
    return {"records": records, "rounds": rounds, "sides": {side: best(of) for side, of in said.items()}}


def best(said: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """The better of all numbers of workers in every figure, by its median."""
    figures: dict[str, Any] = {}
    chosen = {}
    for name in next(iter(said.values()))[0]:
        medians = {workers: statistics.median(of[name] for of in rounds) for workers, rounds in said.items()}
        better = max if re.fullmatch(r"(warm|cold|http)_\d+", name) else min
        chosen[name] = better(medians, key=medians.__getitem__)
        figures[name] = medians[chosen[name]]
    return figures | ({"workers": chosen} if len(said) > 1 else {})


def table(row: dict[str, Any]) -> str:
    """A Markdown table of the sides."""
    names = ["open_seconds", "memory_mib", "first_batch_seconds", "resume_seconds"]
    names += [f"{cache}_{size}" for cache in ("warm", "cold") for size in SIZES]
    names += [f"http_{SIZES[len(SIZES) // 2]}"]
    lines = [f"| {row['name']} | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for side, figures in row["sides"].items():
        values = (
            "-" if name not in figures else f"{figures[name]:{',.0f' if figures[name] >= 10 else '.3f'}}" for name in names
        )
        lines.append(f"| {side} | {' | '.join(values)} |")
    return "\n".join(lines)


def print_simulated(measured: dict[str, Any]) -> None:
    for name, value in measured.items():
        print(f"{name:26}{value:,.3f}" if isinstance(value, float) else f"{name:26}{value:,}")


def compare_kinds(rows: Rows, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        peers = [side for side in options.sides if side in formats.PEERS]
        python = options.peers_python or (install(Path(directory)) if peers else Path())
        pythons = {side: python if side in peers else Path(sys.executable) for side in options.sides}
        for kind, usual in RECORDS.items():
            records = options.records or usual
            expected = SECONDS * options.rounds * (len(pythons) + len(peers))
            work = partial(compare, kind, records, options.rounds, pythons)
            row = rows.measure(f"{kind}, {records:,} records", expected, work)
            print(problem(row) or table(row), end="\n\n")


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--simulate", type=int, metavar="RECORDS", help="open an index that counts so many, and nothing else")
    parser.add_argument("--peers_python", type=Path, help="a Python with the peers; default: one is made and removed")
    parser.add_argument("--sides", nargs="+", choices=formats.SIDES, default=[*formats.SIDES], help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured; default: %(default)s")
    parser.add_argument("--records", type=int, help="of each kind; default: enough for seconds of reading")
    options = parser.parse_args()
    rows = Rows(options.json, __doc__, options.minutes)
    if not options.simulate:
        compare_kinds(rows, options)
    usual = SIMULATED if options.records is None else ()
    for records in [options.simulate] if options.simulate else usual:
        row = rows.measure(f"simulated, {records:,} records", records / 10**7, partial(simulate, records))
        print(problem(row) or row["name"])
        print_simulated({name: value for name, value in row.items() if isinstance(value, int | float)})
    return rows.exit_code


if __name__ == "__main__":
    sys.exit(main())
