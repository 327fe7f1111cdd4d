"""model_index.json, which names the parts of a pipeline and their classes: judged whole before anything is loaded by it.

A class is one of diffusers' or transformers' own, looked up inside these packages. Nothing else that a folder names or holds is
imported: diffusers' own reader would run Python files beside the weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from engine.catalogue import INDEX
from engine.errors import UserError
from engine.files import lies_inside, parse_json, read_text, reading

_POINTER = b"version https://git-lfs"
_PART = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
_NOT_RUN = "nothing of a model's folder is run; give a pipeline of diffusers' own classes"
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}  # in transformers, since these indexes were written


def read_index(pipeline: Path) -> dict[str, Any]:
    """A pipeline's model_index.json, once every class that it names is known to be diffusers' or transformers' own.

    Raises:
        UserError: there is none, it cannot be read, or it names something else.
    """
    file = pipeline / INDEX
    require_inside(file, pipeline)
    index = read_json(file)
    name = index.get("_class_name")
    if not (isinstance(name, str) and name.endswith("Pipeline") and name in dir(diffusers)):
        raise UserError(f"{file}: of a {name}, which is no pipeline of the installed diffusers; {_NOT_RUN}")
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        if not _PART.fullmatch(part) or len(value) != 2 or not all(isinstance(one, str) for one in value):
            raise UserError(f"{file}: {part} is {value}, not the library and the class of a part; {_NOT_RUN}")
        _own_class(file, part, *value)
    return index


def parts_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that an index lists, with library and class; those that are null in it are none."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value != [None, None]
    }


def classes_of(pipeline: Path, expected: Any) -> dict[str, Any]:
    """The classes of the listed parts that a pipeline of the class `expected` is made of.

    Raises:
        UserError: one is of another kind than the pipeline takes.
    """
    listed, kinds = parts_of(read_index(pipeline)), expected._get_signature_types()
    names, _ = expected._get_signature_keys(expected)
    classes = {name: _own_class(pipeline / INDEX, name, *listed[name]) for name in sorted(listed.keys() & set(names))}
    for name, found in classes.items():
        if not _serves(name, found, kinds[name]):
            wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds[name])
            listed_as = ".".join(listed[name])
            raise UserError(
                f"{pipeline / INDEX}: {name} is a {listed_as}, and this pipeline takes a {wanted}; download it again"
            )
    return classes


def _own_class(file: Path, part: str, library: str, name: str) -> Any:
    """A class of diffusers or transformers, by the names that diffusers writes: some of its own by a kind of pipeline."""
    home: Any
    if library == "transformers":
        home, name = transformers, _RENAMED.get(name, name)
    elif library == "diffusers":
        home = diffusers
    elif _PART.fullmatch(library) and library in dir(diffusers.pipelines):
        home = getattr(diffusers.pipelines, library)
    else:
        raise UserError(f"{file}: {part} is a {library}.{name}, no class of diffusers or transformers; {_NOT_RUN}")
    if not has_class(home, name):
        raise UserError(f"{file}: {part} is a {library}.{name}, which the installed libraries do not have")
    return getattr(home, name)


def has_class(home: Any, name: Any) -> bool:
    """Whether a package of diffusers or transformers has a class of this name, of its own."""
    try:
        found = getattr(home, name) if isinstance(name, str) and _PART.fullmatch(name) else None
    except (AttributeError, ImportError, RuntimeError):  # what it needs may not be installed either
        return False
    return isinstance(found, type) and found.__module__.partition(".")[0] in ("diffusers", "transformers")


def _serves(part: str, found: Any, kinds: tuple[Any, ...]) -> bool:
    if "scheduler" in part:
        return issubclass(found, SchedulerMixin)
    if found is transformers.PreTrainedTokenizerFast:  # which reads the files of any; others read files of their own too
        return any(isinstance(kind, type) and issubclass(kind, found) for kind in kinds)
    if issubclass(found, transformers.BaseImageProcessor):  # of which a release has several
        return found.__name__.startswith("CLIPImageProcessor") and any("ImageProcessor" in str(kind) for kind in kinds)
    return any(isinstance(kind, type) and issubclass(found, kind) for kind in kinds)


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file of a model's folder holds.

    Raises:
        UserError: it is not there, damaged, or something else.
    """
    refuse_pointer(file)
    with reading(file, "download it again"):
        value = parse_json(read_text(file))
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs could not be written again
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    return value


def refuse_pointer(file: Path) -> None:
    """Raises `UserError` for what Git LFS leaves in the place of a file that was not downloaded."""
    if not file.is_file():
        return
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}", passing=True) from None
    if start == _POINTER:
        raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def require_inside(file: Path, folder: Path, weights: bool = False) -> None:
    """Refuses links that lead elsewhere, and what is no file: what is read would be found again in what is exported.

    The rule: whatever is read of a model lies in its folder, or among the blobs of the hub's cache that this is from. Only
    models are shared between folders: the whole folder of a part with weights may be a link, whose target its files lie in,
    and so may a file of weights; `check_part` says where these come from.

    Raises:
        UserError: which.
    """
    if not (weights or lies_inside(file, folder)):
        raise UserError(f"{file}: a link that leads out of the model's folder; put a copy of the file there")
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise UserError(f"{file}: not a regular file; download it again")
