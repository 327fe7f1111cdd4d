"""What does a round of the held-out loss cost beside the training? `python -m benchmarks.steps.held_out [--checkpoints N...]`

Rounds over records in shards, reading included, and as many samples of training take turns in one process; on a GPU both
replay their graphs. A round is of the weights and of their average. The tiny models take a step of some milliseconds on a CPU.
"""

import statistics
import sys
import tempfile
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.checkpoints import AIMS, opened
from benchmarks.tools.published import TINY
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept
from benchmarks.tools.shards import write_shards
from benchmarks.tools.sides import WARM_UP, batch_of, open_training, random_records
from benchmarks.tools.tables import markdown
from benchmarks.tools.timing import seconds_in_turns
from engine.data.format.reader import Shards
from engine.loop.held_out import HeldOutLoss, Records
from engine.quiet import quiet_libraries

SIZE, TURNS = 4, 9  # samples per micro-batch; rounds
EXPECTED_SECONDS = {True: 30, False: 300}  # of a row, of a tiny model or a published one


def measure(name: str, records: int, turns: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a round, and its samples per second beside the training's: medians of turns."""
    with settings_kept(), opened(name, device) as checkpoint, tempfile.TemporaryDirectory() as directory:
        family, host = checkpoint.family, torch.device("cpu")
        write_shards(
            Path(directory), records, family.config.family, family.encoding.record_spec,
            rows_of=lambda covers: random_records(family, len(covers), host),
        )  # fmt: skip
        training = open_training(family, checkpoint.load_model(), device, SIZE)
        of = [Records(Shards(Path(directory)), torch.arange(records))]
        loss = HeldOutLoss(training.config, family, training.partition, of, SIZE, training.train_step.captured)
        pairs = 2 * records * len(loss.grid)  # of the weights and of the average
        batch = batch_of(family, random_records(family, SIZE, device), 0, device)
        batches, numbers = repeat(batch), count(1)

        def train_as_many() -> None:
            for _ in range(pairs // SIZE):
                training.train_step(batches, next(numbers))

        rounds = count()
        taken = seconds_in_turns((lambda: loss.measure(next(rounds)), train_as_many), turns, WARM_UP, device)
        loss.close()
    ratios = [of_round / of_steps for of_round, of_steps in zip(*taken, strict=True)]
    seconds, training_seconds = map(statistics.median, taken)
    return {
        "seconds": seconds, "samples": pairs, "samples_per_second": pairs / seconds,
        "training_samples_per_second": pairs / training_seconds, "ratio": statistics.median(ratios),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {
        "held-out loss": "name", "s a round": "seconds", "samples": "samples", "samples/s": "samples_per_second",
        "training, samples/s": "training_samples_per_second", "time of a sample": "ratio",
    })  # fmt: skip


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--checkpoints", nargs="+", choices=[*AIMS, *TINY], default=list(TINY), help="default: the tiny ones")
    parser.add_argument("--records", type=int, default=16, help="that are held out (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=TURNS, help="default: %(default)s")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    for name in options.checkpoints:
        work = partial(measure, name, options.records, options.rounds, device)
        rows.append(kept.measure(name, EXPECTED_SECONDS[name in TINY], work, records=options.records, rounds=options.rounds))
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
