"""Matrix products in fp8, emulated without a GPU: what is converted, that nothing else changes, and what is refused."""

import functools
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.trainer import train
from engine.models import float8
from engine.models.family import open_family
from engine.models.training_form import to_published_form
from tests.loop.runs import checkpoint_tensors
from tests.loop.test_families import config, losses

FAMILIES = ["kandinsky-prior", "wuerstchen"]
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the extra `torchao`")


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(float8, "convert", functools.partial(float8.convert, emulate=True))


def open_model(family, published, images, tmp_path, **options):
    return open_family(config(family, published(family, dropout=0.0), images, tmp_path, **options)).load_model()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_computed_in_fp8_and_the_projections_around_them_are_not(family, published, photographs, tmp_path):
    layers = {name: layer for name, layer in open_model(family, published, photographs, tmp_path).named_modules()
              if isinstance(layer, nn.Linear)}  # fmt: skip
    chosen = {name for name, layer in layers.items() if float8.in_float8(layer, name)}
    block, parts = {
        "kandinsky-prior": ("transformer_blocks.0.", {"attn1.to_qkv", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"}),
        "wuerstchen": ("blocks.2.", {"attention.to_q", "attention.to_kv", "attention.to_out.0", "kv_mapper.1"}),
    }[family]
    assert {name.removeprefix(block) for name in chosen if name.startswith(block)} == parts
    apart = set(layers) - chosen
    assert apart == {name for name in layers if not name.startswith(float8.BLOCKS) or name.endswith(".mapper")}
    assert not float8.in_float8(nn.Linear(24, 32), f"{block}odd")


@needs_torchao
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_the_published_form_stay(family, emulated, published, photographs, tmp_path):
    plain = open_model(family, published, photographs, tmp_path)
    converted = open_model(family, published, photographs, tmp_path, matrix_precision="fp8")
    kinds = {name: type(layer).__name__ for name, layer in converted.named_modules() if isinstance(layer, nn.Linear)}
    assert all((kind == "Float8Linear") == float8.in_float8(plain.get_submodule(name), name) for name, kind in kinds.items())
    assert "Float8Linear" in kinds.values()
    before, after = (dict(to_published_form(model, model.named_parameters())) for model in (plain, converted))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_torchao
def test_training_in_fp8_follows_bf16_and_resumes(emulated, published, photographs, tmp_path):
    models = published("kandinsky-prior")
    options = {"mixed_precision": "bf16", "shards_dir": str(tmp_path / "shards")}
    for name, more in (
        ("bf16", {}),
        ("fp8", {"matrix_precision": "fp8"}),
        ("resumed", {"matrix_precision": "fp8", "resume_from_checkpoint": str(tmp_path / "fp8" / "checkpoint-3")}),
    ):
        assert train(config("kandinsky-prior", models, photographs, tmp_path / name, **options, **more)) == 0
    assert losses(tmp_path / "fp8") != losses(tmp_path / "bf16")
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "bf16"), rel=0.1)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "fp8")[3:]
    kept, exported = (
        [{name: tensor.shape for name, tensor in read(tmp_path / run).items()} for run in ("bf16", "fp8")]
        for read in (
            lambda output: checkpoint_tensors(output / "checkpoint-6", "weight"),
            lambda output: load_file(output / "prior" / "diffusion_pytorch_model.safetensors"),
        )
    )
    assert kept[0] == kept[1]
    assert exported[0] == exported[1]


@pytest.mark.skipif(ON_HOPPER, reason="fp8 runs here")
def test_a_card_without_fp8_is_refused_by_name(published, photographs, tmp_path):
    with pytest.raises(UserError, match="--matrix_precision fp8 needs a GPU of the Hopper generation or newer"):
        open_model("wuerstchen", published, photographs, tmp_path, matrix_precision="fp8")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("wuerstchen", ["--mixed_precision", "bf16"], "needs --compile, which fuses the casts, and --mixed_precision bf16"),
        ("wuerstchen", ["--compile"], "needs --compile, which fuses the casts, and --mixed_precision bf16"),
        ("kandinsky-prior", ["--compile", "--mixed_precision", "bf16", "--train_batch_size", "24"], "multiples of 16, not 24"),
        ("sd", ["--pretrained_model_name_or_path", "org/model"], "--matrix_precision is not used by sd; leave it out"),
        ("kandinsky-decoder", [], "--matrix_precision is not used by kandinsky-decoder; leave it out"),
    ],
)
def test_options_that_fp8_cannot_go_with_are_refused(family, options, message, photographs, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    arguments = ["--family", family, "--train_data_dir", str(photographs), "--matrix_precision", "fp8", *options]
    with pytest.raises(UserError) as error:
        parse(TrainConfig, "engine.run", "", arguments)
    assert message in str(error.value)


@pytest.mark.gpu
@needs_torchao
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_a_compiled_step_in_fp8_follows_bf16_on_a_gpu(published, photographs, tmp_path):
    models = published("wuerstchen", dropout=0.0)
    options = {"mixed_precision": "bf16", "shards_dir": str(tmp_path / "shards"), "compile": True, "train_batch_size": 16}
    for name, more in (("bf16", {}), ("fp8", {"matrix_precision": "fp8"})):
        assert train(config("wuerstchen", models, photographs, tmp_path / name, **options, **more)) == 0
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "bf16"), rel=0.1)
