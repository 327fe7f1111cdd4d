"""Images that are wanted, from words of the command line and from files of prompts: text or JSONL, one prompt a line."""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.command_line import number, open_any, prompt, whole
from engine.errors import UserError, first_line
from engine.messages import warn

FILES = (".txt", ".jsonl")
SEED = whole(-(2**63), 2**63 - 1)
SIDE = whole(8, 2**16)
STEPS = whole(1)
GUIDANCE = number(0)
IMAGES = whole(1, 1024)
_LARGEST_FILE = 2**24  # bytes
_MOST_MISTAKES = 20  # of a file, that are said


@dataclass(frozen=True)
class Wanted:
    """An image to draw. None stands for the pipeline's own.

    width, height: pixels.
    guidance_scale: of the part that reads the prompt.
    """

    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None


def size(text: str) -> tuple[int, int]:
    """Width and height from `512` or `640x448`."""
    sides = [SIDE(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError
    return sides[0], sides[-1]


# A line's key, as diffusers, kohya's scripts and the web interfaces write it -> what reads its value; `images` is how many.
_READERS: dict[str, Callable[[str], Any]] = {
    "prompt": prompt, "negative_prompt": prompt, "seed": SEED, "size": size, "width": SIDE, "height": SIDE, "steps": STEPS,
    "guidance_scale": GUIDANCE, "images": IMAGES,
}  # fmt: skip
_ALSO = {
    "negative": "negative_prompt", "resolution": "size", "num_inference_steps": "steps", "sample_steps": "steps",
    "guidance": "guidance_scale", "scale": "guidance_scale", "cfg_scale": "guidance_scale", "images_per_prompt": "images",
    "num_images_per_prompt": "images",
}  # fmt: skip
# kohya's switches behind a prompt in a line of text.
_IGNORED = ("ss", "g", "rcfg", "cn", "ctr", "fs")  # kohya's too, of other models or of nothing that one line alone may change
_SWITCHES = {"n": "negative_prompt", "d": "seed", "w": "width", "h": "height", "s": "steps", "l": "guidance_scale"}


def read_prompts(texts: Sequence[str], usual: Wanted, images: int) -> list[list[Wanted]]:
    """The images of each prompt, the n-th from its seed + n.

    Args:
        texts: prompts, and names of files that hold some.
        usual: what is wanted where a line says nothing.
        images: of a prompt, likewise.

    Raises:
        UserError: a file cannot be read, or lines of it, which are named by number.
    """
    lines: list[dict[str, Any]] = []
    for text in texts:
        path = Path(text)
        if path.suffix.lower() in FILES:
            lines += _read_file(path)
        elif path.suffix and "\n" not in text and len(text) < 1000 and path.is_file():
            raise UserError(f"--prompts {text}: a file; prompts are read from {' and '.join(FILES)}")
        else:
            lines.append({"prompt": text})
    return [_images_of(line, usual, images) for line in lines]


def _images_of(line: Mapping[str, Any], usual: Wanted, images: int) -> list[Wanted]:
    given = {name: value for name, value in line.items() if name not in ("size", "images")}
    if "size" in line:
        given = dict(zip(("width", "height"), line["size"], strict=True)) | given
    first = replace(usual, **given)
    # Seeds come round at 64 bits, as those of the command line do.
    seeds = [(first.seed + n + 2**63) % 2**64 - 2**63 for n in range(line.get("images", images))]
    return [replace(first, seed=seed) for seed in seeds]


def _read_file(path: Path) -> list[dict[str, Any]]:
    where = f"--prompts {path}"
    try:
        with open_any(path) as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"larger than {_LARGEST_FILE >> 20} MiB")
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give a file of prompts, or prompts") from None
    except ValueError as error:
        raise UserError(f"{where}: cannot be read: {first_line(error)}; save it as UTF-8, one prompt a line") from None
    read = _read_json if path.suffix.lower() == ".jsonl" else _read_text
    found, mistakes = [], []
    for line_number, line in enumerate(lines, 1):
        if not (line := line.strip()) or (line.startswith("#") and read is _read_text):
            continue
        try:
            found.append(_judge(read(line)))
        except (ValueError, RecursionError, argparse.ArgumentTypeError) as error:
            mistakes.append(f"{where}: line {line_number}: {first_line(error)}")
    if mistakes:
        more = len(mistakes) - _MOST_MISTAKES
        raise UserError(*mistakes[:_MOST_MISTAKES], *([f"{where}: {more} more lines cannot be read"] if more > 0 else []))
    if not found:
        raise UserError(f"{where}: holds no prompt; write one a line")
    return found


def _read_json(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if isinstance(values, str):
        return {"prompt": values}
    if not isinstance(values, dict):
        raise ValueError('write an object such as {"prompt": "a cat", "seed": 7, "size": 512}')
    named = {}
    for name, value in values.items():
        key = _ALSO.get(name, name)
        if key not in _READERS:
            raise ValueError(f"unknown key {name}; there are {', '.join(_READERS)}")
        if key == "size" and isinstance(value, list):
            value = "x".join(str(_whole(side)) for side in value)
        if value is not None:
            named[key] = value
    return named


def _read_text(line: str) -> dict[str, Any]:
    text, *switches = re.split(r"\s--(?=[A-Za-z])", f" {line}")
    values: dict[str, Any] = {"prompt": text.strip()}
    for switch in switches:
        name, _, value = switch.partition(" ")
        if name in _IGNORED:
            warn(f"--prompts: --{name} {value.strip()} is passed over; there are --n --d --w --h --s --l, and --scheduler")
            continue
        if name not in _SWITCHES:
            raise ValueError(f"unknown switch --{name}; there are {', '.join(f'--{known}' for known in _SWITCHES)}; any text "
                             "can be a prompt in a .jsonl file")  # fmt: skip
        values[_SWITCHES[name]] = value.strip()
    return values


def _whole(value: Any) -> Any:
    """An integer for a number without a fraction, as tables write those."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _judge(line: dict[str, Any]) -> dict[str, Any]:
    """The values of a line as they are meant.

    Raises:
        ValueError, argparse.ArgumentTypeError: one cannot be what it stands for.
    """
    if "prompt" not in line:
        raise ValueError("no prompt")
    judged = {}
    for name, value in line.items():
        texts = name in ("prompt", "negative_prompt")
        if isinstance(value, bool | dict | list) or (texts != isinstance(value, str) and texts):
            raise ValueError(f"{name} is {json.dumps(value)[:80]}, no {'text' if texts else 'number'}")
        try:
            judged[name] = _READERS[name](str(_whole(value)))
        except ValueError:
            raise ValueError(f"{name} is {str(value)[:80]!r}, no {'size' if name == 'size' else 'number'}") from None
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name} {error}") from None
    return judged
