"""What the rows of levers say: charts of what there is, and a verdict by quartiles."""

import numpy as np
from PIL import Image

from benchmarks.operations import kernels
from benchmarks.tools import waterfall


def test_charts_draw_what_there_is(tmp_path):
    about = {"checkpoint": "sd", "device": "a card", "batch": 4, "settings": {"options": {}}}
    measured = {"samples_per_second": 2.0, "low": 1.0, "high": 3.0, "training_flops_per_sample": 1e9, "bytes_per_step": 1e9}
    failed = about | {"lever": "recipe", "failed": "out of memory"}
    some = [failed, about | {"lever": "captured"} | measured, about | {"lever": "compiled", "missing": "no time left"}]
    assert "| sd | recipe | 4 | out of memory |" in waterfall.table(some)
    for shown in ([], some):
        waterfall.chart(shown, tmp_path / "waterfall.png")
        waterfall.roofline(shown, None, tmp_path / "roofline.png")
    waterfall.roofline([{"name": "matrix product", "measured": 1e14}, *some], 1e12, tmp_path / "roofline.png")
    for name in ("waterfall", "roofline"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5
    kernel = {"operation": "add_noise", "shape": "", "layout": "", "dtype": "bfloat16"}
    whole = kernel | {"share_of_copy_bandwidth": 0.5, "gain": {"script": 2.0}}
    kernels.chart([kernel | {"failed": "no"}, whole, whole | {"gain": {}}], {}, tmp_path / "kernels.png")
    kernels.chart([], {"failed": "no"}, tmp_path / "kernels.png")


def test_norms_are_judged_by_quartiles():
    def rows(low, high):
        about = {"checkpoint": "sd", "device": "a card", "batch": 32, "memory_gib": 40}
        theirs = about | {"lever": "compiled, plain norms", "samples_per_second": 100, "low": 99, "high": 101}
        return [
            theirs,
            about | {"lever": "compiled and captured", "samples_per_second": (low + high) / 2, "low": low, "high": high},
        ]

    assert waterfall.norms_verdict(rows(104, 106)).endswith("= True")
    assert waterfall.norms_verdict(rows(90, 92)).endswith("= False")
    assert "no reason" in waterfall.norms_verdict(rows(99, 103))
    assert waterfall.norms_verdict(rows(99, 103)[:1]) == ""
