"""How large is each family at full size, and what must a step cost? `python -m benchmarks.steps.sizes`

Counted on the meta device, nothing is measured: parameters; operations of the trained model (attention included; training is
three times the forward pass); the bytes of a latent shard's record in bf16; what captions kept as tokens (`--cache_text`) cost
a step; and the bytes that a step must move if everything between matrix products, convolutions and attention were fused into
them:

- per sample, three times what those operations read and write besides weights in a forward pass, 2 bytes per number;
- per step and parameter, 48 bytes (`STEP_BYTES`): 6 for the weights (two readings and the gradient's writing), 4 for laying the
  gradient out flat, and 38 for the optimizer (the norm's reading of the gradient, and its pass of 36).

The time floors are for a card of `--tflops` and `--terabytes` per second; the defaults are assumed for an H200, not measured.
"""

import argparse
import json
import sys
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.cost import sizes_of
from benchmarks.tools.published import CHECKPOINTS


def table(rows: list[dict[str, Any]], flops: float, bandwidth: float) -> str:
    """Markdown tables: sizes, captions kept as tokens, and the floors of a step's time."""
    lines = ["| model | parameters | training TFLOP per sample | KiB per image | KiB per caption | GiB per million |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        total = row["image_bytes"] + row["caption_bytes"]
        lines.append(
            f"| {row['checkpoint']} | {row['parameters'] / 1e6:.1f} M | {3 * row['forward_flops'] / 1e12:.3f} | "
            f"{row['image_bytes'] / 2**10:.1f} | {row['caption_bytes'] / 2**10:.1f} | {total * 1e6 / 2**30:.1f} |"
        )
    lines += ["", "| model | bytes per caption as tokens | TFLOP of the text encoder per caption | of a step's operations |",
              "|---|---|---|---|"]  # fmt: skip
    for row in filter(lambda row: row["text_flops"], rows):
        lines.append(f"| {row['checkpoint']} | {row['token_bytes']} | {row['text_flops'] / 1e12:.4f} | "
                     f"{row['text_flops'] / (3 * row['forward_flops'] + row['text_flops']):.1%} |")  # fmt: skip
    lines += ["", "| model | MiB per sample | GB per step | operations, ms per sample | bytes, ms per sample | "
              "bytes, ms per step | operations per byte at batch 32 |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        operations, sample, constant = 3 * row["forward_flops"], row["sample_bytes"], row["constant_bytes"]
        lines.append(
            f"| {row['checkpoint']} | {sample / 2**20:.0f} | {constant / 1e9:.1f} | {operations / flops * 1e3:.2f} | "
            f"{sample / bandwidth * 1e3:.2f} | {constant / bandwidth * 1e3:.1f} | "
            f"{32 * operations / (32 * sample + constant):.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.steps.sizes", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--tflops", type=float, default=788, help="of a bf16 matrix product (default: %(default)s)")
    parser.add_argument("--terabytes", type=float, default=4.3, help="per second of a copy (default: %(default)s)")
    options = parser.parse_args()
    rows = [sizes_of(checkpoint) for checkpoint in CHECKPOINTS]
    print(json.dumps(rows) if options.json else table(rows, options.tflops * 1e12, options.terabytes * 1e12))
    return 0


if __name__ == "__main__":
    sys.exit(main())
