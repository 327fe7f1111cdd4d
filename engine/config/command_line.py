"""Reading a configuration, from the command line, a TOML file or an index, and what is said of mistakes in it."""

import argparse
import difflib
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from engine.catalogue import FAMILIES
from engine.config.checks import LARGEST, check_machine, check_options, leads_out
from engine.config.elsewhere import answer
from engine.config.mixture import KEYS, OPTIONS, is_inherited, mistakes_of, title_of
from engine.config.optimizers import OTHER_NAMES
from engine.config.options import CacheConfig, TrainConfig, options_of
from engine.config.schema import (
    DIRECTORIES,
    PLACES,
    RECIPES,
    REQUIRED,
    SECRETS,
    UNSTORED,
    options_by_alias,
    options_lacking,
)
from engine.errors import UserError, first_line
from engine.files import open_regular
from engine.messages import say
from engine.storage import is_remote, shown

CONFIG = "config.toml"  # the configuration of a run, in its output directory
_LARGEST_FILE = 2**24  # bytes

Model = TypeVar("Model", bound=CacheConfig)


class Parser(argparse.ArgumentParser):
    """Reports mistakes as `UserError` instead of printing the usage."""

    def error(self, message: str) -> Any:
        switch = re.fullmatch(r"argument (.*): ignored explicit argument .*", message)
        raise UserError(f"{switch[1]} takes no value" if switch else message)


class _SwitchOrTexts(argparse.Action):
    """A switch that may have values, which say how."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), *values] or True)


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """What reads an integer from `low` to `high` for a `Parser`."""

    def integer(text: str) -> int:  # by whose name argparse calls it
        return int(_in_range(int(text), low, high))

    return integer


def number(low: float) -> Callable[[str], float]:
    """What reads a finite number that is at least `low` for a `Parser`."""

    def number(text: str) -> float:
        return float(_in_range(float(text), low, sys.float_info.max))

    return number


def _in_range(value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:
        most = "" if high in (LARGEST, sys.float_info.max) else f" and at most {high}"
        raise argparse.ArgumentTypeError(f"must be at least {low}{most}, not {value}")
    return value


def prompt(text: str) -> str:
    """What reads a text for models for a `Parser`."""
    if problem := _no_text(text):
        raise argparse.ArgumentTypeError(f"{text!r} {problem}")
    return text


def _no_text(value: str) -> str | None:
    """Why a string is none that models, files and names of files can hold."""
    if "\0" in value:
        return "holds a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def choose(commands: Mapping[str, Callable[[list[str]], int]], usage: str) -> int:
    """Runs the command that the command line begins with on the rest of it; returns the exit code."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(f"usage: {usage}")
        return 0
    if command not in commands:
        raise UserError(f"unknown command {command!r}: {usage}")
    return commands[command](arguments)


def parse(
    model: type[Model], program: str, description: str, arguments: Sequence[str], recipe: type[CacheConfig] | None = None
) -> Model:
    """Reads the command line and the TOML file it may name, for work on this machine.

    Args:
        recipe: whose options the file may hold, where these are more than the model's.

    Raises:
        UserError: an unknown option, a bad value or a missing one, named with the remedy.
    """
    namespace, left = build_parser(model, program, description).parse_known_args(list(arguments))
    mistakes = _unknown_arguments(left, model)
    given = vars(namespace)
    file = given.pop("config", None)
    try:
        values = read_toml(recipe or model, Path(file), f"--config {file}", open_any) if file else {}
        values = {name: value for name, value in values.items() if name in model.model_fields}
        logs = values.get("logging_dir")
        if isinstance(logs, str) and leads_out(Path(logs)) and "logging_dir" not in given:
            # Runs of earlier versions wrote their curves anywhere, and stored where.
            say(f"--config {file}: logging_dir {logs} is passed over, because it leads out of the output directory")
            del values["logging_dir"]
        config = load(model, _but_for_other_names(values, given) | given)
    except UserError as error:
        mistakes += error.lines
    if mistakes:
        raise UserError(*mistakes)
    if config.data_sets and config.source and not is_inherited(config.data_sets):
        say(f"{config.source} is passed over, because every [[data]] table names data of its own")
    for name in ("class_data_dir", "class_prompt"):
        if getattr(config, name) and not config.with_prior_preservation:
            say(f"--{name} is passed over without --with_prior_preservation")
    check_machine(config)
    return config


def _unknown_arguments(left: Sequence[str], model: type[BaseModel]) -> list[str]:
    """What is said of the arguments that the parser left: unknown options, whose values are passed over, and strays."""
    mistakes: list[str] = []
    for argument in left:
        argument = re.sub(r"hf_\w+", "hf_...", argument)  # a token, which is nobody's to read
        if re.match(r"-+[A-Za-z]", argument):
            name = argument.split("=", 1)[0]
            mistakes.append(f"unknown option {name}{_hint(name, model)}")
        elif not mistakes:
            mistakes.append(f"unexpected argument {argument!r}; quote values that hold spaces, and give switches none")
    return list(dict.fromkeys(mistakes))


def read_toml(model: type[BaseModel], path: Path, where: str, opened: Callable[[Path], Any] = open_regular) -> dict[str, Any]:
    """The values of a TOML file that holds options of `model`, not yet judged.

    Args:
        where: what mistakes begin with.
        opened: opens the file; one that the user names may also be a pipe.

    Raises:
        UserError: no such file, not TOML, or an unknown option.
    """
    try:
        with opened(path) as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError("too large for a configuration")
        values = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give the path of a TOML file") from None
    except Exception as error:  # of what is no TOML, anything
        raise UserError(f"{where}: not valid TOML: {first_line(error)}; write lines such as `resolution = 512`") from None
    names = options_by_alias(model) | {"data": "data_sets"}
    twice = [f"{alias} and {name}" for alias, name in names.items() if alias in values and name in values]
    if twice:
        raise UserError(*(f"{where}: {both} are one option; leave one out" for both in twice))
    values = {names.get(name, name): value for name, value in values.items()}
    tables = {name for name, value in values.items() if isinstance(value, dict)} - {"lr_of", "data_sets"}
    unknown = [name for name in values if name not in model.model_fields or name in tables]
    if unknown:
        raise UserError(*(f"{where}: {_unknown_value(name, values[name], model)}" for name in unknown))
    if "global_batch_size" in values and values.pop("gradient_accumulation_steps", None) is not None:
        # Runs once wrote down beside it what follows from it.
        say(f"{where}: gradient_accumulation_steps is passed over; it follows from global_batch_size, which stands there too")
    return values


def load(model: type[Model], values: dict[str, Any], where: str = "") -> Model:
    """The configuration that values by option's name make, whichever machine they are for.

    Args:
        where: the file that they come from, for messages.

    Raises:
        UserError: an unknown option, a bad value or a missing one, or options that contradict each other.
    """
    try:
        config = _validate(model, _with_home(values))
        check_options(config)
    except UserError as error:
        error.lines = [f"{where}: {line}" if where else line for line in error.lines]
        raise
    return config


def _but_for_other_names(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values without the name of an optimizer in whose place the command line gives another by its other name."""
    known = str(values.get("optimizer")).lower()
    eight_bits = OTHER_NAMES.get(known, known) == "adamw8bit"
    passed_over = "use_8bit_adam" if "optimizer" in given else None
    if passed_over is None and given.get("use_8bit_adam", eight_bits) != eight_bits:
        passed_over = "optimizer"
    return {name: value for name, value in values.items() if name != passed_over}


def _with_home(values: dict[str, Any]) -> dict[str, Any]:
    """Values in which places that begin with ~ lie in the user's home."""

    def expanded(name: str, value: Any) -> Any:
        if name == "data_sets" and isinstance(value, list):
            return [_with_home(table) if isinstance(table, dict) else table for table in value]
        if name in PLACES and isinstance(value, list):
            return [expanded(name, each) for each in value]
        if name in PLACES and isinstance(value, str) and value.startswith("~"):
            return os.path.expanduser(value)  # noqa: PTH111 (which raises for strangers)
        return value

    return {name: expanded(name, value) for name, value in values.items()}


def _validate(model: type[Model], values: dict[str, Any]) -> Model:
    family = values.get("family")
    # An unknown family, whatever it is, is pydantic's to refuse.
    lacking = options_lacking(model, family) if isinstance(family, str) and family in FAMILIES else []
    refused = [name for name in lacking if name in values]
    mistakes = [f"{', '.join(f'--{name}' for name in refused)} is not used by {family}; leave it out"] if refused else []
    judged = {name: value for name, value in values.items() if name not in refused}
    tables = _judge_tables(model, values) if judged.pop("data_sets", None) is not None else []
    problems = {name: problem for name, value in judged.items() if (problem := _problem(model, name, value))}
    mistakes += [*(f"--{name} {problem}" for name, problem in problems.items()), *tables]
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        mistakes += _explain(error, model, [*refused, *problems, *(["data_sets"] if tables else [])])
    if mistakes:
        raise UserError(*mistakes)
    return config


def _judge_tables(model: type[CacheConfig], values: dict[str, Any]) -> list[str]:
    """A line for every mistake in the `[[data]]` tables."""
    tables, family, folders = values["data_sets"], values.get("family"), values.get("train_data_dir")
    if mistakes := mistakes_of(tables):
        return mistakes
    if isinstance(folders, list) and len(folders) > 1:
        return ["--train_data_dir names several folders beside [[data]] tables; give each a table of its own"]
    for number, table in enumerate(tables, 1):
        lines = [_unknown_key(key, model) for key in table if key not in (*KEYS, *OPTIONS)]
        try:
            options = {name: value for name, value in table.items() if name in OPTIONS}
            if isinstance(family, str) and family in FAMILIES:  # else that is said
                _validate(model, {"family": family, **options})
        except UserError as error:
            lines += error.lines
        mistakes += [f"{title_of(number, table)}: {line}" for line in lines]
    return mistakes


def _unknown_key(key: str, model: type[CacheConfig]) -> str:
    """What is said of a key that no `[[data]]` table has."""
    if key in model.model_fields:
        return f"{key} is of the whole run; write it above the tables"
    closest = difflib.get_close_matches(key, [*KEYS, *OPTIONS], n=1, cutoff=0.7)
    said = f"; did you mean {closest[0]}?" if closest else _hint(key, model)
    return f"unknown key {key}{said}".replace("; --help lists all options", f"; there are {', '.join((*KEYS, *OPTIONS))}")


def _problem(model: type[BaseModel], name: str, value: Any) -> str | None:
    """Why a value, or one of several texts, can be none of an option, whatever pydantic says."""
    if value == "" and name.endswith(("_dir", "_path", "_name", "_checkpoint")):
        return "is empty; a variable of the shell may not be set"
    annotation = model.model_fields[name].annotation if name in model.model_fields else bool
    if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
        return f"{_shown(name, value)}: is no switch; give a value"
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if name in PLACES - DIRECTORIES | {"resume_from_checkpoint"} and any(_too_long(text) for text in texts):
        return f"{_shown(name, value)}: too long for the name of a file"
    return next((f"{_shown(name, text)} {problem}" for text in texts if (problem := _no_text(text))), None)


def open_any(path: Path) -> Any:
    return path.open("rb")


def _too_long(path: str) -> bool:
    """Whether no file can have a name."""
    encoded = path.encode("utf-8", "replace")
    return len(encoded) > 4095 or any(len(part) > 255 for part in encoded.split(b"/"))


def _shown(name: str, value: Any) -> str:
    """A value as messages quote it; of a secret nothing, whatever it is."""
    if name in SECRETS:
        return "(not shown)"
    if isinstance(value, str) and is_remote(value):
        value = shown(value)
    try:
        return repr(value)
    except Exception as error:  # nested too deeply, an integer too long
        return f"({first_line(error)})"


def _explain(error: ValidationError, model: type[BaseModel], known: Collection[str]) -> list[str]:
    """A line for every option that pydantic refused, but those of which it is `known` what is wrong."""
    lines = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        if name in known:
            continue
        if item["type"] == "missing":
            lines.append(f"--{name} is required")
        elif item["type"] == "extra_forbidden":
            lines.append(_unknown_value(name, item["input"], model))
        else:
            lines.append(f"--{name} {_shown(name, item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return list(dict.fromkeys(lines))


def _unknown_value(name: str, value: Any, model: type[BaseModel]) -> str:
    """What is said of a value in a file whose name is no option."""
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        return f"[{name}]: options stand at the top of the file, in no table"
    return f"unknown option {name}{_hint(name, model)}"


def _hint(name: str, model: type[BaseModel]) -> str:
    """What may have been meant by an option that `model` lacks: another's name of it, or a name that is spelt alike."""
    bare = name.lstrip("-")
    dashes = name.removesuffix(bare) and "--"
    plain = bare.replace("-", "_").lower()
    if plain in TrainConfig.model_fields and plain not in model.model_fields:
        return ": an option of engine.run; leave it out here"
    if here := answer(plain):
        return f": here it is {here}" if here.startswith(("-", "`")) else f": {here}"
    names = [option for option in model.model_fields if option != "local_rank"]  # which nobody types
    closest = difflib.get_close_matches(plain, names, n=1, cutoff=0.85)
    return f"; did you mean {dashes}{closest[0]}?" if closest else "; --help lists all options"


def build_parser(model: type[BaseModel], program: str, description: str) -> argparse.ArgumentParser:
    """A parser whose options, groups and help follow the fields of `model`; values stay text for pydantic to judge."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    parser = Parser(
        prog=program,
        usage=f"python -m {program} --family FAMILY [options]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=width),
    )
    parser.add_argument("--config", metavar="FILE.toml", help="Read options from a TOML file; the command line wins.")
    groups: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if extra["group"] is None:
            continue
        title = str(extra["group"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        text = f"{field.description}{_describe_default(field.is_required(), field.default, extra)}".replace("%", "%%")
        flags: list[str] = [f"--{name}", *(f"--{alias}" for alias in extra["aliases"])]  # type: ignore[union-attr]
        if field.annotation is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
        elif name == "train_data_dir":  # which may be several, and are then several data sets
            group.add_argument(*flags, action="append", metavar="DIR", help=text)
        elif bool in get_args(field.annotation):
            group.add_argument(*flags, nargs="*", metavar="VALUE", action=_SwitchOrTexts, help=text)
            group.add_argument(f"--no-{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        elif get_origin(field.annotation) is not Literal and list[str] in (field.annotation, *get_args(field.annotation)):
            group.add_argument(*flags, nargs="+", action="extend", metavar="TEXT", help=text)
        else:
            choices = _choices(field.annotation)
            metavar = "{" + ",".join(choices) + "}" if choices else name.rsplit("_", 1)[-1].upper()
            group.add_argument(*flags, metavar=metavar, help=text)
    return parser


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def _describe_default(required: bool, default: Any, declared: Mapping[str, Any]) -> str:
    """What `--help` says after an option's description: which families have it, and its default."""
    if required:
        return " (required)"
    titles = dict(zip(RECIPES, ("LoRA", "DreamBooth", "both"), strict=True))
    others = "".join(f"; with {titles[recipe]} {_by_value(value)}" for recipe, value in declared["recipes"].items())
    if by_family := declared["by_family"]:
        families = ", ".join(by_family)
        plain = set(map(str, by_family.values())) <= {"None", "False"}
        usual = f"{families} only" if plain else _by_value(by_family)
    else:
        usual = "" if default in (None, False) else f"default: {default}"
    said = f"{usual}{others}".removeprefix("; ")
    return f" ({said})" if said else ""


def _by_value(default: Any) -> str:
    """A default, or the families that have each of several."""
    if not isinstance(default, dict):
        return str(default)
    families_of: dict[str, list[str]] = {}
    for family, value in default.items():
        families_of.setdefault("required" if value is REQUIRED else str(value), []).append(family)
    return "; ".join(f"{', '.join(families)}: {value}" for value, families in families_of.items())


def to_toml(config: CacheConfig) -> str:
    """The resolved configuration as TOML that says the same in any directory, without secrets; options that are not set, or not
    the family's, are left out."""
    values = {name: value for name, value in options_of(config).items() if value is not None and name not in UNSTORED}
    values = _absolute(values)
    if "data_sets" in values:
        values["data"] = [_absolute(table) for table in values.pop("data_sets")]
    if "global_batch_size" in values:
        del values["gradient_accumulation_steps"]  # which follows from it, and from how many processes there are
    return tomli_w.dumps(values)


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    """Values in which paths are absolute, and addresses hold no secrets."""
    places = {name: str(Path(values[name]).absolute()) for name in PLACES & values.keys() if _is_here(name, values[name])}
    addresses = {name: shown(values[name]) for name in {"shards_dir"} & values.keys() if is_remote(values[name])}
    return values | places | addresses


def _is_here(name: str, place: str) -> bool:
    """Whether an option's value is a path from the working directory, and not a name on the hub or elsewhere."""
    return not is_remote(place) and (name in DIRECTORIES or Path(place).exists())
