"""Kernels of attention: the rule, the shapes that a model needs, and what is refused before training begins."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop import attention
from engine.loop.attention import Call, Calls, calls_of, choose, order_of
from engine.loop.trainer import train
from engine.models.family import open_family
from engine.models.training_form import SHIPPED, Form, FusedAttention
from examples.local import RESOLUTION
from tests.loop.runs import config

RESOLUTIONS = {"sd": 16, **RESOLUTION}
CPU = torch.device("cpu")
SHAPE = (torch.Size((2, 2, 8, 40)), (640, 320, 40, 1))
CALL, MASKED = Call(SHAPE, SHAPE, SHAPE, None), Call(SHAPE, SHAPE, SHAPE, (torch.Size((2, 1, 8, 8)), (64, 64, 8, 1)))
ALL = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]


@pytest.fixture(autouse=True)
def switches():
    """Puts the order back."""
    with sdpa_kernel(ALL, set_priority=True), torch.compiler.config.patch(cache_key_tag=""):
        yield


def order() -> list[str]:
    """The kernels that torch may take, in its order."""
    enabled = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(), "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(), "math": torch.backends.cuda.math_sdp_enabled(),
    }  # fmt: skip
    names = {int(kernel): name for name, kernel in attention.KERNELS.items()}
    return [names[kernel] for kernel in torch._C._get_sdp_priority_order() if enabled.get(names.get(kernel))]


@pytest.fixture
def gpu(monkeypatch):
    """torch's choice as on a GPU where every kernel takes every shape: the first in order, its own before the first choice."""
    asked = []

    def choice(*arguments):
        if not asked:
            torch._C._set_sdp_priority_order([1, 2, 0, 3, 4])
        asked.append(arguments)
        return int(attention.KERNELS[order()[0]])

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)


@pytest.mark.parametrize(
    ("wanted", "capability", "cudnn", "expected"),
    [
        ("auto", (9, 0), 91900, ["cudnn", "flash", "efficient", "math"]),
        ("auto", (10, 3), 91900, ["cudnn", "flash", "efficient", "math"]),
        ("auto", (9, 0), 91002, ["flash", "efficient", "math"]),
        ("auto", (9, 0), None, ["flash", "efficient", "math"]),
        ("auto", (8, 0), 91900, ["flash", "efficient", "math"]),
        ("auto", (12, 0), 91900, ["flash", "efficient", "math"]),
        ("flash", (9, 0), 91900, ["flash", "efficient", "math"]),
        ("efficient", (9, 0), 91900, ["efficient", "flash", "math"]),
        ("cudnn", (8, 0), 91002, ["cudnn", "flash", "efficient", "math"]),
    ],
)
def test_the_rule(wanted, capability, cudnn, expected):
    assert order_of(wanted, capability, cudnn) == expected


@pytest.mark.parametrize("form", [SHIPPED, Form(projections=False)], ids=["shipped", "projections apart"])
@pytest.mark.parametrize("name", RESOLUTIONS)
def test_calls_are_those_of_the_training_step(name, form, model, published):
    """Seen on the meta device before training, and in a forward pass of the model that trains."""
    paths = {"pretrained_model_name_or_path": str(model)} if name == "sd" else published(name)
    family = open_family(TrainConfig(family=name, resolution=RESOLUTIONS[name], shards_dir="unused", **paths))
    trained = family.load_model(form)
    record = {key: torch.ones(3, *field.shape, dtype=field.dtype) for key, field in family.encoding.record_spec.items()}
    timesteps = family.schedule.draw(torch.tensor([0]), torch.arange(3), 3)
    with Calls() as mode, torch.no_grad():
        family.predict(trained, record[family.encoding.mean], timesteps, record)
    calls = calls_of(family, trained, 3)
    assert calls == list(mode.calls)
    assert bool(calls) == (name != "wuerstchen" or form.projections)  # its published attention is written out
    assert all(call.query[0][0] == 3 for call in calls)
    assert all((call.mask is not None) == (name == "kandinsky-prior") for call in calls)


def test_a_mask_of_booleans_is_tried_as_one():
    query, mask = torch.zeros(2, 2, 8, 40), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    with Calls() as mode:
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask.float())
    assert [call.adds for call in mode.calls] == [False, True]
    assert [call.tensors(torch.bfloat16, CPU)[3].dtype for call in mode.calls] == [torch.bool, torch.bfloat16]


def test_every_call_is_tried_and_its_kernel_told():
    assert choose("flash", [CALL, MASKED], torch.float32, CPU) == {CALL: "flash", MASKED: "flash"}
    assert order() == ["flash", "efficient", "math"]


def test_a_kernel_that_cannot_run_a_shape_is_refused_by_name():
    with pytest.raises(UserError) as error:
        choose("cudnn", [CALL, MASKED], torch.float32, CPU)
    assert str(error.value) == (
        "--attention cudnn: cannot run queries [2, 2, 8, 40] with keys [2, 2, 8, 40] in float32 on the CPU; choose another, or "
        "leave it out"
    )


def test_the_order_outlives_the_one_that_torch_writes_at_its_first_choice(gpu):
    assert choose("cudnn", [CALL], torch.float32, CPU) == {CALL: "cudnn"}
    assert order() == ["cudnn", "flash", "efficient", "math"]
    # Compiled code holds the kernels that were chosen while it was traced.
    assert torch.compiler.config.cache_key_tag == "attention: cudnn, flash, efficient, math"


def test_auto_goes_on_without_a_kernel_that_fails(gpu, monkeypatch):
    monkeypatch.setattr(attention, "order_of", lambda wanted, *_: order_of(wanted, (9, 0), 91900))
    monkeypatch.setattr(Call, "problem", lambda call, dtype, device: "no plan" if call.mask and order()[0] == "cudnn" else "")
    assert choose("auto", [CALL, MASKED], torch.float32, CPU) == {CALL: "flash", MASKED: "flash"}
    assert order() == ["flash", "efficient", "math"]
    with pytest.raises(
        UserError, match=r"--attention cudnn: .* under a mask in float32 on the CPU \(no plan\); choose another"
    ):
        choose("cudnn", [CALL, MASKED], torch.float32, CPU)


def test_kernels_that_all_fail_are_an_error(gpu, monkeypatch):
    monkeypatch.setattr(Call, "problem", lambda call, dtype, device: "broken")
    with pytest.raises(UserError, match=r"--attention auto: .*\(broken\)"):
        choose("auto", [CALL], torch.float32, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_needs_a_gpu(model, images, shards, tmp_path):
    with pytest.raises(UserError, match="--attention flash: there is no GPU; leave it out"):
        train(config(model, images, shards, tmp_path / "out", attention="flash"))


def test_kernels_are_named_once_per_shape(model, images, shards, tmp_path, monkeypatch, capsys):
    family = open_family(config(model, images, shards, tmp_path, mixed_precision="bf16"))
    monkeypatch.setattr(attention, "choose", lambda wanted, calls, dtype, device: dict.fromkeys(calls, f"{wanted} in {dtype}"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for loud in (True, False):
        attention.prepare(family.config, family, family.load_model(), torch.device("cuda"), loud)
    lines = capsys.readouterr().err.splitlines()
    # The calls with themselves and with the captions have one shape here, and other strides.
    assert lines == ["Attention of queries [4, 8, 16, 4] with keys [4, 8, 16, 4]: auto in torch.bfloat16"]


@pytest.mark.parametrize(
    ("wanted", "capability", "ours"), [("auto", (9, 0), True), ("auto", (8, 0), False), ("cudnn", (9, 0), False)]
)
def test_short_attention_is_ours_where_no_other_is_asked_for(wanted, capability, ours, published, monkeypatch, capsys):
    config = TrainConfig(
        family="kandinsky-prior", resolution=RESOLUTIONS["kandinsky-prior"], shards_dir="unused", attention=wanted,
        mixed_precision="bf16", **published("kandinsky-prior"),
    )  # fmt: skip
    family = open_family(config)
    # The tiny prior's heads are too small.
    monkeypatch.setattr(attention, "fits", lambda tokens, size, dtype, mask: tokens <= 128)
    monkeypatch.setattr(attention, "choose", lambda wanted, calls, dtype, device: dict.fromkeys(calls, "torch's"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = family.load_model()
    attention.prepare(config, family, model, torch.device("cuda"), loud=True)
    kernels = {line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines() if line.startswith("Attention of")}
    assert kernels == {"engine" if ours else "torch's"}
    attentions = [module for module in model.modules() if isinstance(module, FusedAttention)]
    assert attentions
    assert all(module.may_be_short == ours for module in attentions)


def test_short_attention_is_known_by_its_layout():
    stacked = torch.Size((2, 32, 81, 64)), (81 * 6144, 64, 6144, 1)
    apart = torch.Size((2, 32, 81, 64)), (81 * 2048, 64, 2048, 1)
    mask = torch.Size((2, 1, 81, 81)), (81 * 81, 81 * 81, 81, 1)
    assert Call(stacked, stacked, stacked, mask).is_short(torch.bfloat16)
    assert not Call(stacked, stacked, stacked, mask, adds=False).is_short(torch.bfloat16)
    assert not Call(stacked, stacked, stacked, MASKED.mask).is_short(torch.bfloat16)
    assert not Call(stacked, stacked, stacked, None).is_short(torch.float32)
    assert not Call(apart, apart, apart, None).is_short(torch.bfloat16)
    assert not Call(stacked, apart, apart, None).is_short(torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "flash", "efficient"])
def test_kernels_run_on_a_gpu(wanted):
    device = torch.device("cuda")
    kernels = choose(wanted, [CALL], torch.bfloat16, device)
    assert wanted in ("auto", kernels[CALL])
    assert choose("auto", [MASKED], torch.bfloat16, device)[MASKED] != "flash"


@pytest.mark.parametrize(("queries", "keys", "masked"), [(192, 192, False), (192, 77, False), (81, 81, True)])
def test_gradients_of_the_chosen_kernel_are_right(queries, keys, masked):
    """A kernel can be wrong at odd lengths, or where every logit is far below zero, and raise nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, length, 64, device=device) for length in (queries, keys, keys))
    mask = torch.full((1, 1, queries, keys), -10000.0, device=device).triu(1) if masked else None

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (query, key, value)]
        attended = F.scaled_dot_product_attention(*inputs, attn_mask=None if mask is None else mask.to(dtype))
        return [gradient.float() for gradient in torch.autograd.grad(attended.float().square().sum(), inputs)]

    with sdpa_kernel(SDPBackend.MATH):
        exact = gradients(torch.float32)
    choose("auto", [CALL], torch.bfloat16, device)
    for gradient, reference in zip(gradients(torch.bfloat16), exact, strict=True):
        assert float((gradient - reference).norm() / reference.norm()) < 0.05
    # The softmax of a constant shift is the same; its logarithmic sum, about -120, is not.
    query[..., 0], key[..., 0] = 1.0, -120 * 8
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(torch.bfloat16))
