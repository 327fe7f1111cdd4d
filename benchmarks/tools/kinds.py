"""The records that formats are compared with, and the seed of their orders: nothing here needs the engine, which peers lack."""

from typing import Literal

# Kind -> fields of a record: what bf16 numbers they are, and whether they belong to the image or to the caption.
KINDS: dict[str, dict[str, tuple[tuple[int, ...], Literal["image", "caption"]]]] = {
    "sd": {"latent_mean": ((4, 64, 64), "image"), "latent_std": ((4, 64, 64), "image"),
           "encoder_hidden_states": ((77, 768), "caption")},
    "prior": {"image_embedding": ((1280,), "image"), "text_embedding": ((1280,), "caption")},
}  # fmt: skip
SEED = 7
