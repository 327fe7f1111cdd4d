"""Builds, verifies and describes latent shards: `python -m engine.shards build|verify|info ...`."""

import sys
from pathlib import Path

from engine.catalogue import PIPELINES
from engine.config.checks import check_picture
from engine.config.command_line import Parser, choose, load, parse, whole
from engine.config.options import CacheConfig
from engine.errors import exit_code

USAGE = "python -m engine.shards build|verify|info ...; each has --help"


def build_command(arguments: list[str]) -> int:
    config = parse(CacheConfig, "engine.shards build", "Encode a data set into latent shards.", arguments)
    # After parsing, so that --help and mistakes answer at once.
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.data.describe import summary
    from engine.data.encode import encode_source
    from engine.data.sources import open_source
    from engine.models.encoder import open_encoding
    from engine.processes import Processes

    quiet_libraries()
    processes = Processes()
    try:
        encoding = open_encoding(config)
        processes.connect()
        index = encode_source(config, encoding, open_source(config, encoding.captioned), processes)
    finally:
        processes.close()
    if processes.is_first:
        print(summary(config.shards_path, index))
    return 0


def verify_command(arguments: list[str]) -> int:
    parser = Parser("engine.shards verify", description="Read every shard and compare it with the digest in the index.")
    parser.add_argument("directory", type=Path, help="directory of the shards")
    directory = parser.parse_args(arguments).directory
    from tqdm import tqdm

    from engine.data.format.index import Index
    from engine.data.format.verify import verify

    index = Index.read(directory)
    with tqdm(total=len(index.shards), desc="Verifying", unit="shard", disable=None) as progress:
        problems = verify(directory, index.shards, progress=progress.update)
    for file, problem in problems.items():
        print(f"{directory / file}: {problem}")
    print(f"{len(index.shards) - len(problems)} of {len(index.shards)} shards are whole")
    return 1 if problems else 0


def info_command(arguments: list[str]) -> int:
    parser = Parser("engine.shards info", description="Describe shards, with a contact sheet of decoded records.")
    parser.add_argument("directory", type=Path, help="directory of the shards")
    parser.add_argument(
        "--records", type=whole(0, 1024), default=24, help="records on the contact sheet, 0 for none (default: 24)"
    )
    parser.add_argument("--record", type=whole(0, 2**40), help="only say which file and captions this record came from")
    parser.add_argument("--output", type=Path, help="the contact sheet (default: contact-sheet.png beside the shards)")
    for name in PIPELINES:
        parser.add_argument(f"--{name}", help="to decode with (default: as the shards were built)")
    options = parser.parse_args(arguments)
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.data.describe import contact_sheet, summary
    from engine.data.format.index import INDEX, Index

    index = Index.read(options.directory)
    if options.record is not None:
        from engine.data.describe import describe_record

        print(describe_record(options.directory, index, options.record))
        return 0
    output = options.output or options.directory / "contact-sheet.png"
    if options.records:
        check_picture("--output", output)
    print(summary(options.directory, index))
    if index.records and options.records:
        built = load(CacheConfig, index.config, str(options.directory / INDEX))
        models = {name: value for name in PIPELINES if (value := getattr(options, name)) is not None}
        config = load(CacheConfig, index.config | models) if models else built
        from engine.models.encoder import open_encoding
        from engine.picture import save_png

        quiet_libraries()
        encoding = open_encoding(config)
        save_png(contact_sheet(options.directory, index, encoding, options.records), output)
        print(f"contact sheet  {output}")
    return 0


COMMANDS = {"build": build_command, "verify": verify_command, "info": info_command}


def main() -> int:
    return choose(COMMANDS, USAGE)


if __name__ == "__main__":
    sys.exit(exit_code("engine.shards", main))
