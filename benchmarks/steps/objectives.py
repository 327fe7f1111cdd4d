"""What does each objective cost a training step? `python -m benchmarks.steps.objectives [--checkpoints NAME...]`

Steps of a training with an objective and of one without take turns, on the same batch; on a GPU both replay their graphs. The
tiny models take a step of some milliseconds on a CPU, beside which small operations show most: what an objective costs a step
of a published size is less. Timesteps and their coefficients are drawn by the loader's thread beside the step; how long that
takes a sample is a column of its own.
"""

import statistics
import sys
import time
from functools import partial
from itertools import count, repeat
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.checkpoints import AIMS, opened
from benchmarks.tools.published import CHECKPOINTS, TINY
from benchmarks.tools.question import command_line, this_device
from benchmarks.tools.rows import Rows
from benchmarks.tools.settings import settings_kept
from benchmarks.tools.sides import WARM_UP, batch_of, open_training, random_records
from benchmarks.tools.tables import markdown
from benchmarks.tools.timing import Work, seconds_in_turns, spread
from engine.config.options import TrainConfig
from engine.config.schema import options_lacking
from engine.data.samples.loader import DRAWN
from engine.quiet import quiet_libraries

# Name -> options of the command line.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "stratified timesteps": {"timestep_sampling": "stratified"},
    "logit-normal timesteps, biased": {
        "timestep_sampling": "logit_normal", "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0,
    },
    "Min-SNR weights": {"snr_gamma": 5.0},
    "soft Min-SNR weights": {"loss_weighting": "soft_min_snr"},
    "P2 weights": {"loss_weighting": "p2"},
    "debiased estimation": {"loss_weighting": "debiased"},
    "EDM weights": {"loss_weighting": "edm"},
    "Huber loss": {"loss_type": "huber"},
    "smooth L1 loss": {"loss_type": "smooth_l1"},
    "noise offset and perturbation": {"noise_offset": 0.1, "input_perturbation": 0.1},
    "mask": {"mask_column": "mask"},
    "pyramid noise": {"pyramid_noise_discount": 0.3},
    "DREAM": {"dream_training": True},
    "gradient noise scale": {"gradient_accumulation_steps": 2, "gradient_noise_scale": True},
}  # fmt: skip
SIZE, TURNS = 4, 200  # samples per micro-batch; steps of each side
EXPECTED_SECONDS = {True: 20, False: 200}  # of a row, of a tiny model or a published one


def objectives_of(name: str) -> list[str]:
    """The objectives that the family of a checkpoint has."""
    lacking = options_lacking(TrainConfig, name if name in TINY else CHECKPOINTS[name][0])
    return [objective for objective, options in OBJECTIVES.items() if not options.keys() & lacking]


def step_of(name: str, options: dict[str, Any], device: torch.device) -> tuple[Work, Any]:
    """A call that trains a step, and the schedule that draws for it."""
    with opened(name, device, **options) as checkpoint:
        torch.manual_seed(7)
        family = checkpoint.family
        record = random_records(family, SIZE, device, torch.Generator(device).manual_seed(7))
        training = open_training(family, checkpoint.load_model(), device, SIZE, **options)
        batches, numbers = repeat(batch_of(family, record, 0, device)), count(1)
        return lambda: training.train_step(batches, next(numbers)), family.schedule


def measure(name: str, objective: str, turns: int, device: torch.device) -> dict[str, Any]:
    """Samples per second with an objective and without, from steps in turns, and the ratio of their times, turn by turn."""
    options = OBJECTIVES[objective]
    accumulation = options.get("gradient_accumulation_steps", 1)
    with settings_kept():
        plain, _ = step_of(name, {"gradient_accumulation_steps": accumulation}, device)
        other, schedule = step_of(name, options, device)
        seconds = seconds_in_turns((plain, other), turns, WARM_UP, device)
    ratio, low, high = spread([after / before for before, after in zip(*seconds, strict=True)])
    before, after = (SIZE * accumulation / statistics.median(taken) for taken in seconds)
    return {
        "samples_per_second": after, "without": before, "ratio": ratio, "quartiles": [low, high],
        "draw_microseconds": draw_microseconds(schedule),
    }  # fmt: skip


def draw_microseconds(schedule: Any, repeats: int = 9) -> float:
    """Of a sample: its timestep and coefficients, drawn with those of `DRAWN` samples."""
    seed, slots, taken = torch.tensor([7]), torch.arange(DRAWN), []
    for _ in range(repeats):
        started = time.perf_counter()
        schedule.coefficients(schedule.draw(seed, slots, 64))
        taken.append((time.perf_counter() - started) / DRAWN * 1e6)
    return statistics.median(taken)


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(rows, {
        "objective": "name", "samples/s": "samples_per_second", "without": "without", "time of a step": "ratio",
        "to draw a sample, µs": "draw_microseconds",
    })  # fmt: skip


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--checkpoints", nargs="+", choices=[*AIMS, *TINY], default=list(TINY), help="default: the tiny ones")
    parser.add_argument("--steps", type=int, default=TURNS, help="of each side (default: %(default)s)")
    options = parser.parse_args()
    quiet_libraries()
    device = this_device()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    for name in options.checkpoints:
        for objective in objectives_of(name):
            work = partial(measure, name, objective, options.steps, device)
            row = kept.measure(
                f"{name}: {objective}", EXPECTED_SECONDS[name in TINY], work, checkpoint=name, steps=options.steps
            )
            rows.append(row)
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
