"""What adapters take, counted: stacking saves products, and a frozen base keeps less."""

import torch
import torch.nn.functional as F

from benchmarks.steps import adapters
from benchmarks.tools.published import open_tiny
from engine.models.parts import empty_copy


def test_the_forms_are_counted_and_compared(tmp_path, monkeypatch):
    # Once ZeRO 3 has run in a process, DeepSpeed's own linear layers keep their inputs whatever is frozen.
    monkeypatch.setattr(F, "linear", torch._C._nn.linear)
    family = open_tiny("kandinsky-prior", tmp_path, lora_rank=4)
    model = family.published_model()
    rows = {row["form"]: row for row in adapters.count_all(family, lambda: empty_copy(model))}
    full, peft, apart, stacked = (rows[form] for form in ("full", "peft", "apart", "stacked"))
    blocks, width = len(model.transformer_blocks), model.transformer_blocks[0].attn1.to_q.in_features
    # An adapter of each of four projections.
    assert peft["trained"] == apart["trained"] == stacked["trained"] == blocks * 4 * 2 * width * 4
    # Three projections of a block are one: 3 products forward (the base's, A's, B's) instead of 9, and 5 backward instead of
    # 15; in the first block nothing before asks for a gradient, and these are 3 instead of 9.
    assert apart["products"] - stacked["products"] == blocks * 16 - 4
    assert stacked["kernels"] < apart["kernels"] < peft["kernels"]
    assert max(stacked["moved_bytes"], apart["moved_bytes"]) < peft["moved_bytes"]
    assert stacked["kept_bytes"] < full["kept_bytes"]
    assert stacked["flops"] < full["flops"]
    assert "stacked" in adapters.table([{"checkpoint": "tiny", **row} for row in rows.values()])
