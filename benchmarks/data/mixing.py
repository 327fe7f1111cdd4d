"""How well does each order mix the records? `python -m benchmarks.data.mixing [--json FILE]`

A data set sorted by class (64 classes, 512 shards of 1,024 records) is the worst for an order by locality. Over every epoch:

- variance: of the share of each class in consecutive batches, over what independent draws would give; 1 is as good as random,
  0 better. An order that reads shard after shard has the number of records of a batch.
- spread: how many distinct classes the 1,024 samples around a place of the epoch hold, in the mean.
- distance: how far apart in storage samples lie that follow each other, in shares of the data set; one third where they are
  independent.
- repeats: how many of the pairs of records that are in one batch of one epoch are in one batch of the next, over what
  independent orders would give.
- open_shards: how many are begun and not ended, at the most: what a cache must hold.

`py1e` is the default order of MosaicML's streaming, by its definition: shards permuted, and every sample moved from its place
by a random distance, so that a shard's samples lie within its block size, varied by a quarter. It gives the same records as
`get_shuffle_py1e` of streaming 0.13.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import problem
from engine.data.samples.order import order_of

SHARDS, SHARD, CLASSES, BATCH, EPOCHS, SEED = 512, 1024, 64, 256, 3, 7
NEAR = 1024  # samples
WINDOWS = [1, 16, 64, 256]
MEASURES = ("variance", "spread", "distance", "repeats", "open_shards")


def ours(window: int | None, epoch: int) -> np.ndarray:
    """The records of an epoch, in the order of its slots."""
    records = np.full(SHARDS, SHARD)
    return order_of(SEED, records, window)(torch.arange(SHARDS * SHARD) + epoch * SHARDS * SHARD).numpy()


def py1e(window: int, epoch: int) -> np.ndarray:
    """The same as streaming's `get_shuffle_py1e` gives them for one canonical node and blocks of `window` shards."""
    count, block = SHARDS * SHARD, window * SHARD
    spans = [np.arange(start, start + SHARD) for start in range(0, count, SHARD)]
    np.random.default_rng(SEED).shuffle(places := list(range(SHARDS)))
    generator = np.random.default_rng(SEED + epoch)
    generator.shuffle(places)
    records = [spans[place] for place in places]
    for part in records:
        generator.shuffle(part)
    positions = np.arange(count, dtype=np.float64)
    for start in range(0, count, SHARD):
        reach = max((generator.integers(int(0.75 * block), int(1.25 * block)) - SHARD) / 2, 0)
        low, high = max(-reach, -start), min(reach, count - start - SHARD)
        positions[start : start + SHARD] += generator.uniform(low, high, SHARD)
    return np.concatenate(records)[np.argsort(positions)]


def measure(order: Callable[[int], np.ndarray]) -> dict[str, Any]:
    """What the docstring says, over the epochs of an order."""
    epochs = [order(epoch) for epoch in range(EPOCHS)]
    classes = np.stack(epochs) * CLASSES // (SHARDS * SHARD)
    return {
        "variance": float(np.mean([variance(epoch) for epoch in classes])),
        "spread": float(np.mean([len(np.unique(part)) for epoch in classes for part in epoch.reshape(-1, NEAR)])),
        "distance": float(np.mean([np.abs(np.diff(epoch)).mean() / len(epoch) for epoch in epochs])),
        "repeats": repeats(epochs[0], epochs[1]),
        "open_shards": max(most_open(epoch // SHARD) for epoch in epochs),
    }


def variance(classes: np.ndarray) -> float:
    batches = classes.reshape(-1, BATCH)
    counts = np.stack([np.bincount(batch, minlength=CLASSES) for batch in batches])
    return float(counts.var(0).mean() / (BATCH / CLASSES * (1 - 1 / CLASSES)))


def repeats(one: np.ndarray, other: np.ndarray) -> float:
    """Over the pairs of records that follow each other in a batch of `one`."""
    batch = np.empty(len(other), np.int64)
    batch[other] = np.arange(len(other)) // BATCH
    pairs = batch[one.reshape(-1, BATCH)]
    same = (pairs[:, 1:] == pairs[:, :-1]).mean()
    return float(same / ((BATCH - 1) / (len(one) - 1)))


def most_open(shards: np.ndarray) -> int:
    """How many shards are begun and not ended, at the most."""
    _, first = np.unique(shards, return_index=True)
    _, last = np.unique(shards[::-1], return_index=True)
    change = np.zeros(len(shards) + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, len(shards) - last, -1)
    return int(change.cumsum().max())


def main() -> int:
    parser = command_line(__doc__)
    options = parser.parse_args()
    kept = Rows(options.json, __doc__, options.minutes)
    orders: dict[str, Callable[[int], np.ndarray]] = {"global": partial(ours, None)}
    for window in WINDOWS:
        orders |= {f"blocks, window {window}": partial(ours, window), f"py1e, block {window}": partial(py1e, window)}
    for name, order in orders.items():
        row = kept.measure(name, 3, partial(measure, order))
        print(f"{name:20}", problem(row) or "  ".join(f"{of} {row[of]:.3g}" for of in MEASURES))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
