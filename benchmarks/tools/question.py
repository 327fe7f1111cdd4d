"""What the command lines of questions have in common."""

import argparse
import re
from pathlib import Path

import torch


def command_line(document: str) -> argparse.ArgumentParser:
    """The options of a question that keeps its rows, named and described by its documentation."""
    named = re.search(r"python -m ([\w.]+)", document)
    assert named is not None
    parser = argparse.ArgumentParser(named[1], description=document.splitlines()[0])
    parser.add_argument("--json", type=Path, help="keep the rows there, and measure only what is not there yet")
    parser.add_argument("--minutes", type=float, help="begin no row that would not end within so many minutes")
    return parser


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
