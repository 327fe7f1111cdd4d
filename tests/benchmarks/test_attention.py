"""The comparison of attention's kernels: real shapes, padded heads, and a side that does not run."""

import torch

from benchmarks.operations.attention import SIDES, attention_of, calls_by_checkpoint, measure_call, table
from benchmarks.tools.rows import Rows
from engine.loop.attention import Call

CPU = torch.device("cpu")
LAYOUT = (torch.Size((1, 2, 5, 40)), (400, 40, 80, 1))
CALL = Call(LAYOUT, LAYOUT, LAYOUT, None)


def test_shapes_are_those_of_the_published_models():
    sizes = {"SD 1.5, 512 px": {40, 80, 160}, "Kandinsky 2.2 prior": {64}, "Wuerstchen v2 prior, 768 px": {64}}
    found = calls_by_checkpoint(list(sizes), CPU)
    assert {name: {call.query[0][-1] for call in calls} for name, calls in found.items()} == sizes
    assert "queries [2, 8, 4096, 40] with keys [2, 8, 77, 40]" in map(str, found["SD 1.5, 512 px"])
    assert [call.mask is not None for call in found["Kandinsky 2.2 prior"]] == [True]


def test_padded_heads_attend_alike():
    arguments = [tensor if tensor is None else tensor.detach() for tensor in CALL.tensors(torch.float32, CPU)]
    for tensor in arguments[:3]:
        tensor.normal_()
    plain, padded = attention_of("flash", 40, 40)(*arguments), attention_of("flash", 40, 64)(*arguments)
    torch.testing.assert_close(padded, plain)


def test_a_kernel_that_does_not_run_costs_only_itself(monkeypatch):
    monkeypatch.setitem(SIDES, "cpu", ("flash", "cudnn"))
    row = Rows(None, "What?").measure("a call", 0, lambda: measure_call(CALL, torch.float32, CPU))
    assert row["forward"].keys() == row["training"].keys() == {"flash", "flash, padded"}
    assert row["notes"].keys() == {"cudnn", "cudnn, padded"}
    assert "| a call | flash, padded |" in table([row])
    assert "| a call | cudnn | does not run: " in table([row])


def test_attention_within_a_short_projection_is_ours_too(monkeypatch):
    monkeypatch.setitem(SIDES, "cpu", ("math",))
    stacked = torch.Size((2, 4, 17, 16)), (17 * 192, 16, 192, 1)
    call = Call(stacked, stacked, stacked, (torch.Size((2, 1, 17, 17)), (289, 289, 17, 1)))
    assert measure_call(call, torch.bfloat16, CPU)["training"].keys() == {"math", "engine"}
