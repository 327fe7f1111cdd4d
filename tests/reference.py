"""Independent references: Philox and the draws of the slot contract in numpy, and the shards read with plain safetensors."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

WORD = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 on uint64 arrays [..., 4] that hold 32-bit words."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k0, p1 & WORD, (p0 >> np.uint64(32)) ^ c[3] ^ k1, p0 & WORD]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & WORD, (k1 + np.uint64(0xBB67AE85)) & WORD
    return np.stack(c, -1)


def words(seed: int, slot: int, stream: int, count: int) -> np.ndarray:
    """The words of elements 0 .. count - 1."""
    groups = -(-count // 4)
    seed, slot = seed % 2**64, slot % 2**64
    counter = np.zeros((groups, 4), np.uint64)
    counter[:, 0] = np.arange(groups)
    counter[:, 1], counter[:, 2], counter[:, 3] = slot & 0xFFFFFFFF, slot >> 32, stream
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[: 4 * groups]


def normals(seed: int, slots, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unit normals in double precision, [B, *shape]."""
    count = int(np.prod(shape))
    result = []
    for slot in slots:
        uniform = ((words(seed, int(slot), stream, count) >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24
        radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)
        result.append(pairs[:count].reshape(shape))
    return np.stack(result)


def choice(seed: int, slot: int, stream: int, count: int) -> int:
    uniform = (int(words(seed, slot, stream, 1)[0]) // 256 + 0.5) / 2**24
    return int(np.floor(uniform * count))


class PlainShards:
    """Records of a shard directory, read as docs/shards.md describes them and without the engine's reader.

    images: of each record, its variants.
    captions: of all shards, one after another; caption_numbers: of each record, counted among them.
    """

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / "index.json").read_text())
        table = load_file(directory / f"index-{index['shards'][:16]}.safetensors")
        self.images: list[list[dict[str, torch.Tensor]]] = []
        self.captions: list[torch.Tensor] = []
        self.caption_numbers: list[list[int]] = []
        for number in table["number"].tolist():
            path = directory / f"shard-{number:05d}.safetensors"
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()["engine"])
            per_image = [name for name, field in index["fields"].items() if field["per"] == "image"]
            for record in range(said["records"]):
                rows = range_of(tensors.get("image_offsets"), said["variants"], record)
                self.images.append([{name: tensors[name][row] for name in per_image} for row in rows])
                places = range_of(tensors.get("caption_offsets"), abs(said["captions"]) - (said["captions"] == -2), record)
                numbers = tensors.get("caption_numbers", torch.arange(said["records"]))
                self.caption_numbers.append([len(self.captions) + int(numbers[place]) for place in places])
            self.captions += list(tensors["tokens" if "tokens" in tensors else "encoder_hidden_states"])


def range_of(offsets: torch.Tensor | None, count: int, record: int) -> range:
    if offsets is None:
        return range(record * count, (record + 1) * count)
    return range(*offsets[record : record + 2].tolist())


def batch(
    data: PlainShards, records: list[int], slots: list[int], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What training reads and draws for slots that have these records.

    Returns:
        Latents and noise [B, C, H, W] in fp32, and captions as they are stored.
    """
    pairs = list(zip(records, slots, strict=True))
    chosen = [data.images[r][choice(seed, s, 6, len(data.images[r]))] for r, s in pairs]
    numbers = [data.caption_numbers[r][choice(seed, s, 5, len(data.caption_numbers[r]))] for r, s in pairs]
    mean, std = (torch.stack([image[name] for image in chosen]) for name in ("latent_mean", "latent_std"))
    shape = tuple(mean.shape[1:])
    noise, posterior = (torch.from_numpy(normals(seed, slots, stream, shape)).float() for stream in (0, 1))
    return mean + std * posterior, noise, torch.stack([data.captions[number] for number in numbers])
