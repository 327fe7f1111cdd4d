"""How large is each family at full size? `python -m benchmarks.sizes`

Parameters and operations of the trained models, counted on the meta device (attention included; training is three times the
forward pass), and the bytes of a latent shard's record in bf16, read from the record that the engine would write.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import engine.quiet  # noqa: F401 (before the libraries that it quiets)
from benchmarks.published import CHECKPOINTS, trained_model, write
from engine.loop.metrics import forward_flops
from engine.models.family import open_family


def measure(checkpoint: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        family = open_family(write(checkpoint, Path(directory)))
        fields = family.record_spec.values()
    with torch.device("meta"):
        model = trained_model(checkpoint)
    return {
        "checkpoint": checkpoint,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_flops": forward_flops(family, model),
        "image_bytes": sum(field.row_bytes for field in fields if field.per == "image"),
        "caption_bytes": sum(field.row_bytes for field in fields if field.per == "caption"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'model':32}{'parameters':>12}{'forward TFLOP':>15}{'training':>10}{'KiB/image':>11}{'KiB/caption':>13}"
             f"{'GiB/million':>13}"]  # fmt: skip
    for row in rows:
        total = row["image_bytes"] + row["caption_bytes"]
        lines.append(
            f"{row['checkpoint']:32}{row['parameters'] / 1e6:>10.1f} M{row['forward_flops'] / 1e12:>15.3f}"
            f"{3 * row['forward_flops'] / 1e12:>10.3f}{row['image_bytes'] / 2**10:>11.1f}{row['caption_bytes'] / 2**10:>13.1f}"
            f"{total * 1e6 / 2**30:>13.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    rows = [measure(checkpoint) for checkpoint in CHECKPOINTS]
    print(json.dumps(rows) if "--json" in sys.argv[1:] else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
