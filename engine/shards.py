"""Builds, verifies, converts and describes latent shards: `python -m engine.shards build|verify|convert|info ...`."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from engine.catalogue import DECODER, FAMILIES, IMAGE_ENCODER, MODEL, PRIOR
from engine.config.checks import check_picture, holds_shards
from engine.config.command_line import Parser, choose, load, parse, whole
from engine.config.mixture import data_sets_of
from engine.config.options import CacheConfig, TrainConfig
from engine.errors import UserError, exit_code, printable
from engine.storage import is_remote, shown

_DATA = ("dataset_name", "dataset_config_name", "train_data_dir")
_SHARDS = "directory of the shards, or one that has a directory of them for each data set"
_MODELS = [MODEL, PRIOR, DECODER, IMAGE_ENCODER, "revision", "variant", "original_config", "tokenizer_name", "cache_dir"]
USAGE = "python -m engine.shards build|verify|convert|info ...; each has --help"


def build_command(arguments: list[str]) -> int:
    # A recipe of a training also says what its shards hold.
    config = parse(CacheConfig, "engine.shards build", "Encode a data set into latent shards.", arguments, TrainConfig)
    # After parsing, so that --help and mistakes answer at once.
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.data.class_images import draw_class_images
    from engine.data.describe import summary
    from engine.data.format.buckets import read_indexes
    from engine.data.parts import build_parts
    from engine.models.encoder import open_encoding
    from engine.processes import Processes

    quiet_libraries()
    processes = Processes()
    try:
        processes.connect()
        encoding = processes.first_before_others(lambda: open_encoding(config))
        draw_class_images(config, encoding, processes)
        built = [each.config for each in data_sets_of(config) if each.config.source or not each.name]
        for each in built:
            build_parts(each, encoding.of_data_set(each), processes)
    except UserError as error:
        processes.let_the_first_speak(error)
        raise
    finally:
        processes.close()
    if processes.is_first:
        places = [each.shards_path for each in built]
        print(*(summary(place, read_indexes(place)) for place in places), sep="\n\n")
    return 0


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, str]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def local(text: str) -> Path:
    """What reads a directory of this machine for a `Parser`."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is an address; copy the shards to a directory of this machine")
    return Path(text)


def _data_sets_in(directory: Path) -> list[Path]:
    """The directories of shards that a directory has, each of a data set; itself alone where it is one, or has none."""
    if holds_shards(directory) or not directory.is_dir():
        return [directory]
    return sorted(path for path in directory.iterdir() if holds_shards(path)) or [directory]


def verify_command(arguments: list[str]) -> int:
    parser = Parser("engine.shards verify", description="Read every shard and compare it with its digest and its checksums.")
    parser.add_argument("directory", type=local, help=_SHARDS)
    directory = parser.parse_args(arguments).directory
    from tqdm import tqdm

    from engine.data.format.buckets import read_indexes
    from engine.data.format.index import BUILD_AGAIN
    from engine.data.format.verify import verify

    indexes = {place / name: index for place in _data_sets_in(directory) for name, index in read_indexes(place).items()}
    count, problems = sum(len(index.shards) for index in indexes.values()), dict[str, str]()
    with tqdm(total=count, desc="Verifying", unit="shard", disable=None) as progress:
        for place, index in indexes.items():
            found = verify(place, index, range(len(index.shards)), rows=True, progress=progress.update)
            problems |= {str(place / file): problem for file, problem in found.items()}
    for file, problem in problems.items():
        print(printable(f"{file}: {problem}"))
    print(f"{count - len(problems)} of {count} shards are whole" + (f"; {BUILD_AGAIN}" if problems else ""))
    return 1 if problems else 0


def convert_command(arguments: list[str]) -> int:
    parser = Parser("engine.shards convert", description="Write shards of format version 1 as version 2, without an encoder.")
    parser.add_argument("directory", type=local, help="directory of the shards")
    parser.add_argument(
        "--output", type=local, help="a directory for the new ones (default: the same; they take the place of the old ones)"
    )
    for name in _DATA:
        parser.add_argument(
            f"--{name}", help="the data set as it was, whose files are read, so that the shards grow as others do"
        )
    parser.add_argument("--cache_dir", help="where the hub's data sets are kept")
    options = parser.parse_args(arguments)
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.data.convert import convert
    from engine.data.describe import DATA, summary
    from engine.data.format.buckets import is_bucketed, read_indexes

    quiet_libraries()
    output = options.output or options.directory
    if not is_bucketed(options.directory):
        convert(options.directory, output, _given(options, DATA))
    elif output != options.directory:
        raise UserError(f"{options.directory}: shards of buckets are of version 2 already; copy the directory")
    print(summary(output, read_indexes(output)))
    return 0


def info_command(arguments: list[str]) -> int:
    parser = Parser("engine.shards info", description="Describe shards, with a contact sheet of decoded records.")
    parser.add_argument("directory", type=local, help=_SHARDS)
    parser.add_argument(
        "--records", type=whole(0, 1024), default=24, help="records on the contact sheet, 0 for none (default: 24)"
    )
    parser.add_argument("--record", type=whole(0, 2**40), help="only say which sample and captions this record came from")
    parser.add_argument("--refused", action="store_true", help="only list the samples that were refused, and why")
    parser.add_argument("--output", type=Path, help="the contact sheet (default: contact-sheet.png beside the shards)")
    for name in _DATA:
        parser.add_argument(f"--{name}", help="with --record: the data set, to name the file in it")
    for name in _MODELS:
        parser.add_argument(f"--{name}", help="to decode with, as for build; without any there is no contact sheet")
    options = parser.parse_args(arguments)
    import engine.quiet  # noqa: F401  # isort: skip (before the libraries that it quiets)
    from engine.data.describe import DATA, describe_record, list_refused
    from engine.data.format.buckets import read_indexes

    places = _data_sets_in(options.directory)
    for option in ("record", "output"):
        if len(places) > 1 and getattr(options, option) is not None:
            raise UserError(f"--{option} is of one data set; give its directory: {' or '.join(map(str, places))}")
    for number, place in enumerate(places):
        if options.record is not None:
            print(describe_record(place, read_indexes(place), options.record, _given(options, DATA)))
        elif options.refused:
            for line in list_refused(place, read_indexes(place)):
                print(line if len(places) == 1 else f"{place.name}: {line}")
        else:
            print("\n" * (number > 0), end="")
            _describe(place, options)
    return 0


def _describe(directory: Path, options: argparse.Namespace) -> None:
    """Says what the shards of a data set hold, and draws it."""
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.data.describe import contact_sheet, summary
    from engine.data.format.buckets import is_bucketed, read_indexes
    from engine.data.format.index import INDEX

    indexes = read_indexes(directory)
    index = next((index for index in indexes.values() if index.records), next(iter(indexes.values())))
    output = options.output or directory / "contact-sheet.png"
    models = _given(options, _MODELS)
    if options.records and models:
        check_picture("--output", output)
    print(summary(directory, indexes))
    if is_bucketed(directory):
        print(f"chart          {_draw_buckets(directory, output)}")
    if index.records and options.records and not models:
        # Whoever wrote the index may have named any.
        named = FAMILIES[index.family].classes if index.family in FAMILIES else _MODELS[:1]
        print(f"contact sheet  give the models to draw it with: {', '.join(f'--{name}' for name in named)}")
    elif index.records and options.records:
        built = {name: value for name, value in index.config.items() if name not in _MODELS} | {"family": index.family}
        config = load(CacheConfig, built | models, str(directory / INDEX))
        from engine.models.encoder import open_encoding
        from engine.picture import save_png

        quiet_libraries()
        encoding = open_encoding(config)
        save_png(contact_sheet(directory, indexes, encoding, options.records), output)
        print(f"contact sheet  {output}")


def _draw_buckets(directory: Path, sheet: Path) -> str:
    """Draws how many images each bucket has, beside the contact sheet; where that is, or why it is not."""
    from engine.data.format.buckets import Buckets
    from engine.data.format.index import BUCKETS
    from engine.picture import bars

    buckets, path = Buckets.read(directory / BUCKETS).buckets, sheet.with_name("buckets.png")
    panels = {
        "images": [float(bucket.images) for bucket in buckets],
        "cropped away on average, %": [100 * bucket.cropped for bucket in buckets],
    }
    try:
        bars([bucket.name for bucket in buckets], panels, path)
    except OSError as error:
        return f"cannot be written to {path}: {error.strerror}; name another place with --output"
    return str(path)


COMMANDS = {"build": build_command, "verify": verify_command, "convert": convert_command, "info": info_command}


def main() -> int:
    return choose(COMMANDS, USAGE)


if __name__ == "__main__":
    sys.exit(exit_code("engine.shards", main))
