"""Mutations: each takes what is altered and a generator of random numbers, and is the same for the same seed."""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Json = Any

OUTSIDE = "outside"  # the folder beside everything given, where a canary lies and nothing may be written
CANARY = "canary-of-a-stranger"  # the content of its files
DEPTH = 100_000  # of what is nested

# Stand in a value for what no serialiser writes, and are replaced in the text.
_NESTED, _HUGE, _TWICE = "nested-100000-times", "an-integer-of-5000-digits", "a-key-twice"
_RAW = {
    f'"{_NESTED}"': "[" * DEPTH + "]" * DEPTH,
    f'"{_HUGE}"': "9" * 5000,
}

STRANGE_TEXTS = (
    "", " ", "x", "é", "\0", "\x1b[31m\x07", "one\ntwo", "\u202ereversed", "\ud800", "a" * 10_000, ".", "..", "/", "NaN",
    "true", f"../{OUTSIDE}/canary.txt", f"../../{OUTSIDE}/canary.txt", f"../../../{OUTSIDE}", "CON", "$HOME", "~", "%s%n", "-1",
)  # fmt: skip
_STRANGE_NUMBERS = (
    0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.5, 1e-320,
    1e308, math.nan, math.inf, -math.inf, -0.0,
)  # fmt: skip
_STRANGE_VALUES = (None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, _NESTED, _HUGE)


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """One to three alterations anywhere: bits, extreme numbers, pieces that are lost, doubled, moved, or of another place."""
    altered = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        size = len(altered)
        start = random.randrange(size + 1)
        end = min(size, start + random.choice((1, 2, 4, 16, 256, 4096)))
        match random.randrange(9):
            case 0 if start < size:
                altered[start] ^= 1 << random.randrange(8)
            case 1:
                altered[start:end] = random.randbytes(end - start)
            case 2:
                del altered[start:end]
            case 3:
                altered[start:start] = altered[start:end]
            case 4:
                del altered[start:]
            case 5:
                altered[start:end] = bytes([random.choice((0, 0xFF, 0x20, 0x22, 0x5B))]) * (end - start)
            case 6:
                number = random.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
                altered[start : start + 4] = number.to_bytes(4, random.choice(("little", "big")))  # type: ignore[arg-type]
            case 7:
                other = random.randrange(size + 1)
                altered[start:end] = altered[other : other + end - start]
            case _:
                altered[start:start] = random.choice(STRANGE_TEXTS).encode("utf-8", "surrogatepass")[:4096]
    return bytes(altered)


def _places(value: Json) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) within a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


def _strange(value: Json, random: Random) -> Json:
    """Something in a value's place: near it, of its type, or of another."""
    if random.random() < 0.4:
        match value:
            case bool():
                return not value
            case int() | float():
                return random.choice((value + 1, value - 1, -value, value * 2, value // 2, str(value), float(value)))
            case str() if value:
                place = random.randrange(len(value))
                return value[:place] + random.choice(("", "x", "/", "\x1b", "\u202e", "0")) + value[place + 1 :]
    return random.choice(
        (random.choice(STRANGE_TEXTS), random.choice(_STRANGE_NUMBERS), copy.deepcopy(random.choice(_STRANGE_VALUES)))
    )


def mutated_value(value: Json, random: Random) -> Json:
    """A value of JSON or TOML in which one to three places differ."""
    whole = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(whole))
        # The first few levels hold what is looked at; below them may lie thousands of tokens.
        container, key = random.choice(places if random.random() < 0.7 or len(places) < 50 else places[:50])
        match random.randrange(10):
            case 0 if container is not whole:
                del container[key]
            case 1 if isinstance(container, dict):
                container[random.choice(STRANGE_TEXTS)] = container.pop(key)
            case 2 if isinstance(container, dict):
                container[random.choice(("x", "", "__class__", "auto_map", "_class_name", "\x1b[0m"))] = _strange(
                    container[key], random
                )
            case 3 if isinstance(container, dict):
                container[_TWICE] = _strange(container[key], random)
            case 4 if isinstance(container, list) and container is not whole:
                other = random.randrange(len(container))
                container[key], container[other] = container[other], container[key]
            case 5 if isinstance(container, list) and container is not whole:
                container.insert(key, copy.deepcopy(random.choice(container)))
            case 6:
                container[key] = copy.deepcopy(random.choice([c[k] for c, k in random.sample(places, min(len(places), 20))]))
            case _:
                container[key] = _strange(container[key], random)
    return whole[0]


def text_of(value: Json, dump: Callable[[Json], str], random: Random) -> bytes:
    """A value as `dump` writes it, with what it does not write put in."""
    text = dump(value)
    for placeholder, raw in _RAW.items():
        text = text.replace(placeholder, raw)
    if _TWICE in text and isinstance(value, dict) and (keys := [key for key in value if key != _TWICE]):
        text = text.replace(_TWICE, str(random.choice(keys)).replace("\\", "").replace('"', ""))
    return text.encode("utf-8", "surrogatepass")


def mutated_json(content: bytes, random: Random) -> bytes:
    """JSON of which a value, or now and then a byte, differs."""
    if random.random() < 0.15:
        return mutated_bytes(content, random)
    return text_of(mutated_value(json.loads(content), random), lambda value: json.dumps(value, indent=1), random)


def mutated_tensors(content: bytes, random: Random) -> bytes:
    """A safetensors file: its tensors' values, its header, or what lies where."""
    if random.random() < 0.1:
        return mutated_bytes(content, random)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    counted = [name for name in names if header[name]["dtype"] in ("I64", "I32")]
    name = random.choice(counted if counted and random.random() < 0.4 else names)
    tensor = header[name]
    start, end = tensor["data_offsets"]
    match random.randrange(12):
        case 0 | 1 if end > start:
            _alter_numbers(data, start, end, tensor["dtype"], random)
        case 2:
            tensor["shape"] = random.choice(
                (tensor["shape"][::-1], [*tensor["shape"], 1], [math.prod(tensor["shape"])], [0], [2**62, 4])
            )
        case 3:
            tensor["dtype"] = random.choice(("F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X", "I16"))
        case 4:
            other = random.choice(names)
            header[name], header[other] = header[other], header[name]
        case 5:
            header[str(_strange(name, random))] = header.pop(name)
        case 6:
            del header[name]
        case 7:
            shift = random.choice((1, -1, 4, 8, -8, 2**40))
            tensor["data_offsets"] = random.choice(([start + shift, end + shift], [start, end + shift], [end, start]))
        case 8:
            del data[start:end]  # a tensor is gone, and those after it lie where it was
            for other in names:
                header[other]["data_offsets"] = [n - (end - start) if n >= end else n for n in header[other]["data_offsets"]]
            del header[name]
        case 9 if "engine" in header.get("__metadata__", {}):
            header["__metadata__"]["engine"] = mutated_json(header["__metadata__"]["engine"].encode(), random).decode(
                "utf-8", "replace"
            )
        case 10:
            number = random.choice((0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1))
            return number.to_bytes(8, "little") + content[8:]
        case _:
            header = mutated_value(header, random)
    text = text_of(header, json.dumps, random)
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _alter_numbers(data: bytearray, start: int, end: int, dtype: str, random: Random) -> None:
    """Sets one element, or exchanges two."""
    size = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "F64": 8}.get(dtype, 1)
    first, second = (start + random.randrange((end - start) // size) * size for _ in range(2))
    if random.random() < 0.2:
        data[first : first + size], data[second : second + size] = data[second : second + size], data[first : first + size]
    elif dtype.startswith("I"):
        number = int.from_bytes(data[first : first + size], "little", signed=True)
        limit = 2 ** (8 * size - 1)
        number = random.choice((number + 1, number - 1, 0, -1, limit - 1, -limit, 10**6))
        data[first : first + size] = max(-limit, min(number, limit - 1)).to_bytes(size, "little", signed=True)
    else:
        data[first : first + size] = random.choice((b"\xff" * size, b"\0" * (size - 1) + b"\x7f", random.randbytes(size)))


def mutate_content(path: Path, random: Random) -> str:
    """Alters the bytes of a file, whatever it is."""
    rewrite(path, mutated_bytes(path.read_bytes(), random))
    return "bytes altered"


def rewrite(path: Path, content: bytes) -> None:
    """Puts content in a file's place; what is linked to the same bytes keeps its own."""
    path.unlink()
    path.write_bytes(content)


def mutate_file(path: Path, random: Random) -> str:
    """Alters a file by its kind; says how."""
    content = path.read_bytes()
    kinds = {".json": mutated_json, ".safetensors": mutated_tensors}
    rewrite(path, kinds.get(path.suffix, mutated_bytes)(content, random))
    return f"{path.name} altered"


def mutate_folder(folder: Path, random: Random) -> str:
    """Alters which files a folder holds, and what they are; says how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = random.choice(files)
    name = path.relative_to(folder).as_posix()
    outside = next(parent / OUTSIDE for parent in folder.parents if (parent / OUTSIDE).is_dir())
    match random.randrange(10):
        case 0:
            path.unlink()
            return f"{name} removed"
        case 1:
            rewrite(path, b"")
            return f"{name} emptied"
        case 2:
            content = path.read_bytes()
            rewrite(path, content[: random.randrange(len(content) + 1)])
            return f"{name} cut short"
        case 3:
            path.unlink()
            path.mkdir()
            return f"{name} a directory"
        case 4:
            path.unlink()
            path.symlink_to(random.choice((outside / "canary.txt", outside, path, folder / "nowhere", Path("/dev/zero"))))
            return f"{name} a link"
        case 5:
            path.unlink()
            os.mkfifo(path)
            return f"{name} a pipe"
        case 6:
            other = random.choice(files)
            rewrite(path, other.read_bytes() if other != path else b"other")
            return f"{name} is {other.name}"
        case 7:
            stray = path.with_name(
                random.choice(("rank-9.safetensors", "stray.bin", "x.json", "\x1b[31m.txt", "added_tokens.json"))
            )
            shutil.copy(random.choice(files), stray)
            return f"{stray.name!r} added"
        case 8:
            path.with_name("linked.txt").symlink_to(outside / "canary.txt")
            return "a link added"
        case _:
            plant(path.parent, outside)
            return "a program added"


def plant(folder: Path, outside: Path) -> None:
    """Puts programs where libraries look for some; each leaves a mark when it runs."""
    program = f"open({str(outside / 'ran')!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("evil.py", "pipeline.py", "modeling_evil.py", "__init__.py"):
        (folder / name).write_text(program)
