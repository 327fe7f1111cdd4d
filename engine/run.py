"""Trains a model: `python -m engine.run --family sd ...`, also under `torchrun -m` and `deepspeed --module`."""

import argparse
import contextlib
import sys
import tomllib
from pathlib import Path

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.errors import UserError, exit_code
from engine.failed import leave_note_unless_held
from engine.files import read_text
from engine.launcher import launched


def main() -> int:
    try:
        config = parse(TrainConfig, "engine.run", "Train a text-to-image diffusion model.", sys.argv[1:])
    except UserError as error:
        # A script that starts the command again looks there; a person reads the message. Each process may be the only one that
        # comes so far: a launcher ends all when one has left.
        named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        named.add_argument("--output_dir", nargs="?")
        named.add_argument("--config", nargs="?")
        given = named.parse_known_args(sys.argv[1:])[0]
        output = given.output_dir or _in_recipe(given.config, "output_dir")
        if output and launched():
            leave_note_unless_held(Path(output), error)
        raise
    # After parsing, so that --help and mistakes answer at once.
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.loop.trainer import train

    quiet_libraries()
    return train(config)


def _in_recipe(path: str | None, name: str) -> str | None:
    """A text that a recipe holds, whatever is wrong with the rest of it."""
    with contextlib.suppress(Exception):  # what is no TOML raises anything, and is told of already
        value = tomllib.loads(read_text(Path(path or "")))[name]
        return value if isinstance(value, str) else None
    return None


if __name__ == "__main__":
    sys.exit(exit_code("engine.run", main))
