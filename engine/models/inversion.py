"""Textual inversion (arXiv:2208.01618): vectors of new tokens, trained beside a model that stays as it is.

The tokenizer by which shards are built knows the tokens; CLIP's embeddings look their vectors up beside the frozen ones.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config.options import CacheConfig, TrainConfig
from engine.errors import UserError
from engine.files import write_atomically
from engine.models.training_form import TextEmbeddings

VECTORS = "text_encoder.embeddings.vectors"  # the trained parameter


class NewTokens(TextEmbeddings):
    """CLIP's embeddings of tokens [B, N], of which those from number `first` on have vectors of their own, [vectors, C]."""

    first: int
    vectors: nn.Parameter

    def embed(self, input_ids: Tensor) -> Tensor:
        is_new = input_ids >= self.first
        new = F.embedding((input_ids - self.first).clamp(min=0), self.vectors)
        known = self.token_embedding(input_ids.masked_fill(is_new, 0))
        return torch.where(is_new[..., None], new, known)


def new_tokens(config: CacheConfig) -> list[str]:
    """The tokens of `--placeholder_token`, one for each vector, as diffusers' pipelines name them."""
    token = str(config.placeholder_token)
    return [token, *(f"{token}_{number}" for number in range(1, config.num_vectors))]


def extend(tokenizer: Any, config: CacheConfig) -> int:
    """Teaches a tokenizer the new tokens; returns the number of the first.

    Raises:
        UserError: it has them already.
    """
    first, tokens = len(tokenizer), new_tokens(config)
    tokenizer.add_tokens(tokens)
    if tokenizer.convert_tokens_to_ids(tokens) != list(range(first, first + len(tokens))):
        raise UserError(f"--placeholder_token {config.placeholder_token}: the tokenizer has this token; give one that is new")
    return first


def token_number(tokenizer: Any, config: TrainConfig) -> int:
    """The token of `--initializer_token`.

    Raises:
        UserError: it is not one.
    """
    numbers = tokenizer.encode(config.initializer_token, add_special_tokens=False)
    if len(numbers) != 1:
        raise UserError(f"--initializer_token {config.initializer_token}: makes {len(numbers)} tokens; give a word that is one")
    return int(numbers[0])


def spelled(caption: str, config: CacheConfig) -> str:
    """A caption with all new tokens in the place of the first, as diffusers' pipelines read it."""
    return caption.replace(str(config.placeholder_token), " ".join(new_tokens(config)))


def add_vectors(text_encoder: Any, first: int, count: int, initializer: int | None = None) -> None:
    """Gives a text encoder new tokens, in place.

    Args:
        first: the number of the first of them.
        initializer: the token whose vector all begin with; None for zeros.
    """
    embeddings = text_encoder.embeddings
    known = embeddings.token_embedding.weight.detach()
    start = known.new_zeros(count, known.shape[1]) if initializer is None else known[initializer].repeat(count, 1)
    embeddings.__class__, embeddings.first, embeddings.vectors = NewTokens, first, nn.Parameter(start)


def write_vectors(file: Path, token: str, vectors: Tensor) -> None:
    """Writes the vectors [vectors, C] of a token as `pipeline.load_textual_inversion` loads them."""
    tensors = {token: vectors.detach().to("cpu", torch.float32).contiguous()}
    write_atomically(file, lambda path: save_file(tensors, path, {"format": "pt"}))
