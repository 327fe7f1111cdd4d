"""Trains a model: `python -m engine.run --family sd ...`, also under `torchrun -m` and `deepspeed --module`."""

import sys

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.errors import exit_code


def main() -> int:
    config = parse(TrainConfig, "engine.run", "Train a text-to-image diffusion model.", sys.argv[1:])
    # After parsing, so that --help and mistakes answer at once.
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.loop.trainer import train

    quiet_libraries()
    return train(config)


if __name__ == "__main__":
    sys.exit(exit_code("engine.run", main))
