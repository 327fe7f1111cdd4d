"""Builds, verifies and describes latent shards: `python -m engine.cache build|verify|info ...`."""

import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from engine.catalogue import PIPELINES
from engine.config.command_line import Parser, load, parse
from engine.config.options import CacheConfig
from engine.data.format import INDEX, Index, Shards, verify
from engine.errors import UserError, exit_code
from engine.tensors import read_header

USAGE = "python -m engine.cache build|verify|info ...; each has --help"


def build_command(arguments: list[str]) -> int:
    config = parse(CacheConfig, "engine.cache build", "Encode a data set into latent shards.", arguments)
    # After parsing, so that --help and mistakes answer at once.
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.data.encode import build
    from engine.data.sources import open_source
    from engine.models.family import open_family
    from engine.processes import Processes

    quiet_libraries()
    processes = Processes()
    try:
        family = open_family(config)
        processes.connect()
        index = build(config, family, open_source(config, family.captioned), processes)
    finally:
        processes.close()
    if processes.is_first:
        print(summary(config.shards_path, index))
    return 0


def verify_command(arguments: list[str]) -> int:
    parser = Parser("engine.cache verify", description="Read every shard and compare it with the digest in the index.")
    parser.add_argument("directory", type=Path, help="directory of the shards")
    directory = parser.parse_args(arguments).directory
    index = Index.read(directory)
    with tqdm(total=len(index.shards), desc="Verifying", unit="shard", disable=None) as progress:
        problems = verify(directory, index.shards, progress=progress.update)
    for file, problem in problems.items():
        print(f"{directory / file}: {problem}")
    print(f"{len(index.shards) - len(problems)} of {len(index.shards)} shards are whole")
    return 1 if problems else 0


def info_command(arguments: list[str]) -> int:
    parser = Parser("engine.cache info", description="Describe shards, with a contact sheet of decoded records.")
    parser.add_argument("directory", type=Path, help="directory of the shards")
    parser.add_argument("--records", type=int, default=24, help="records on the contact sheet (default: 24)")
    parser.add_argument("--output", type=Path, help="the contact sheet (default: contact-sheet.png beside the shards)")
    for name in PIPELINES:
        parser.add_argument(f"--{name}", help="to decode with (default: as the shards were built)")
    options = parser.parse_args(arguments)
    index = Index.read(options.directory)
    print(summary(options.directory, index))
    if index.records and options.records > 0:
        output = options.output or options.directory / "contact-sheet.png"
        models = {name: value for name in PIPELINES if (value := getattr(options, name)) is not None}
        contact_sheet(options.directory, index, options.records, output, models)
        print(f"contact sheet  {output}")
    return 0


def summary(directory: Path, index: Index) -> str:
    """What an index says, for a person."""
    size = sum(shard.bytes for shard in index.shards)
    lines = [
        f"shards         {directory} ({len(index.shards)} files, {size / 2**20:.1f} MiB)",
        f"family         {index.family}",
        f"records        {index.records}",
        f"image rows     {sum(shard.image_rows for shard in index.shards)}",
        f"captions       {sum(shard.caption_rows for shard in index.shards)} distinct",
        f"refused        {len(index.refused)}",
    ]
    reasons = Counter(item["reason"] for item in index.refused)
    lines += [f"  {count:6d}       {reason}" for reason, count in reasons.most_common(10)]
    for name, field in index.fields.items():
        shape = " x ".join(map(str, field.shape))
        lines.append(f"field          {name}: {shape} {str(field.dtype).removeprefix('torch.')} per {field.per}")
    lines.append(f"fingerprint    {index.fingerprint}")
    return "\n".join(lines)


def contact_sheet(directory: Path, index: Index, count: int, output: Path, models: dict[str, str]) -> None:
    """Decodes records spread evenly over the shards into one picture, each under its caption.

    Args:
        models: options that name pipelines, instead of those that the shards were built with.
    """
    from engine.quiet import quiet_libraries  # isort: skip (before the libraries that it quiets)
    from engine.models.family import open_family
    from engine.picture import labelled_grid, save_png

    quiet_libraries()
    family = open_family(load(CacheConfig, index.config | models, str(directory / INDEX)))
    shards = Shards(directory)
    count = min(count, len(shards))
    records = torch.linspace(0, len(shards) - 1, count).round().long()
    rows = shards.first_rows(records)
    latents = torch.empty(count, *index.fields[family.mean].shape, dtype=index.fields[family.mean].dtype)
    shards.gather(family.mean, rows["image"], latents)
    texts = [text for shard in index.shards for text in read_header(directory / shard.file)[1]["captions"]]
    labels = [texts[number] for number in rows["caption"].tolist()] if "caption" in rows else [f"{r}" for r in records]
    images = family.decode(latents)
    by_label: dict[str, list] = {}
    for label, image in zip(labels, images, strict=True):
        by_label.setdefault(label, []).append(image)
    save_png(labelled_grid(list(by_label.items())), output)


COMMANDS = {"build": build_command, "verify": verify_command, "info": info_command}


def main() -> int:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(f"usage: {USAGE}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}: {USAGE}")
    return COMMANDS[command](arguments)


if __name__ == "__main__":
    sys.exit(exit_code("engine.cache", main))
