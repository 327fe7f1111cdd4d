"""Trains a model: `python -m engine.run --family sd ...`, also under `torchrun -m` and `deepspeed --module`."""

import sys
from pathlib import Path

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.errors import UserError, exit_code
from engine.failed import leave_note_unless_held
from engine.launcher import launched, rank


def main() -> int:
    try:
        config = parse(TrainConfig, "engine.run", "Train a text-to-image diffusion model.", sys.argv[1:])
    except UserError as error:
        # A script that starts the command again looks there; a person reads the message.
        if "--output_dir" in sys.argv[:-1] and launched() and rank() == 0:
            leave_note_unless_held(Path(sys.argv[sys.argv.index("--output_dir") + 1]), error)
        raise
    # After parsing, so that --help and mistakes answer at once.
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.loop.trainer import train

    quiet_libraries()
    return train(config)


if __name__ == "__main__":
    sys.exit(exit_code("engine.run", main))
