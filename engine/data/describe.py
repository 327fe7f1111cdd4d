"""What shards hold, for a person: a summary in words, and a contact sheet of decoded records."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from engine.data.format.index import Index
from engine.data.format.shard import Shards
from engine.data.report import by_reason
from engine.picture import labelled_grid
from engine.tensors import read_header

if TYPE_CHECKING:  # the libraries of the models take seconds, and a summary needs none
    from engine.models.encoder import Encoding


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
    lines += [f"  {len(items):6d}       {reason}" for reason, items in by_reason(index.refused).items()]
    for name, field in index.fields.items():
        shape = " x ".join(map(str, field.shape))
        lines.append(f"field          {name}: {shape} {str(field.dtype).removeprefix('torch.')} per {field.per}")
    lines.append(f"fingerprint    {index.fingerprint}")
    return "\n".join(lines)


def contact_sheet(directory: Path, index: Index, encoding: "Encoding", count: int) -> Image.Image:
    """Records spread evenly over the shards, decoded, each under its caption."""
    shards = Shards(directory)
    count = min(count, len(shards))
    records = torch.linspace(0, len(shards) - 1, count).round().long()
    rows = shards.rows_of(records)
    latents = torch.empty(count, *index.fields[encoding.mean].shape, dtype=index.fields[encoding.mean].dtype)
    shards.gather(encoding.mean, rows["image"], latents)
    texts = [text for shard in index.shards for text in read_header(directory / shard.file)[1]["captions"]]
    labels = [texts[number] for number in rows["caption"].tolist()] if "caption" in rows else [f"{r}" for r in records]
    images = encoding.decode(latents)
    by_label: dict[str, list] = {}
    for label, image in zip(labels, images, strict=True):
        by_label.setdefault(label, []).append(image)
    return labelled_grid(list(by_label.items()))
