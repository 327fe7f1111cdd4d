"""What is counted of the published sizes is what is published."""

import pytest

from benchmarks.steps import sizes
from benchmarks.tools.cost import sizes_of

# Parameters in millions and training TFLOP per sample, as published configurations come to.
EXPECTED = {
    "SD 1.5, 512 px": (859.5, 2.41), "SD 2.1, 512 px": (865.9, 2.41), "Kandinsky 2.2 decoder, 512 px": (1253, 2.57),
    "Kandinsky 2.2 decoder, 768 px": (1253, 5.98), "Kandinsky 2.2 prior": (1026, 0.494),
    "Wuerstchen v2 prior, 768 px": (994, 3.46),
}  # fmt: skip
# The share of a step's operations that the text encoder has where captions are tokens.
TEXT = {"SD 1.5, 512 px": 0.0055, "SD 2.1, 512 px": 0.0184, "Kandinsky 2.2 prior": 0.165, "Wuerstchen v2 prior, 768 px": 0.0275}


@pytest.mark.parametrize("checkpoint", EXPECTED)
def test_full_size_models_have_the_published_size(checkpoint):
    parameters, training = EXPECTED[checkpoint]
    row = sizes_of(checkpoint)
    assert row["parameters"] / 1e6 == pytest.approx(parameters, rel=6e-4)
    assert 3 * row["forward_flops"] / 1e12 == pytest.approx(training, rel=2e-3)
    assert checkpoint in sizes.table([row], 788e12, 4.3e12)
    share = row["text_flops"] / (3 * row["forward_flops"] + row["text_flops"])
    assert share == pytest.approx(TEXT.get(checkpoint, 0.0), abs=5e-4)


def test_the_costs_are_counted():
    row = sizes_of("Kandinsky 2.2 prior")
    # Two readings of the weights, the gradient, its copy to the flat buffer, the norm, and the optimizer's pass.
    assert row["constant_bytes"] == (2 + 2 + 2 + 4 + 2 + 36) * row["parameters"]
    # Per block and token, in widths of 2048: queries, keys and values 6, attention 4, its projection 2, the MLP 10.
    assert row["sample_bytes"] == pytest.approx(3 * 2 * 20 * 81 * 22 * 2048, rel=0.01)
