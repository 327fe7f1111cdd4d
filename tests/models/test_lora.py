"""Adapters in the training form: what PEFT computes, and back into its names."""

import warnings

import pytest
import torch

from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop.flops import step_flops
from engine.models.adapter import Adapter, write_adapter
from engine.models.family import open_family
from engine.models.lora import AdaptedLinear, adapted_layers, add_adapters, chosen_layers
from engine.models.training_form import (
    SHIPPED,
    ChannelsLastConv2d,
    FusedAttention,
    alphas_of,
    to_published_form,
    to_training_form,
)
from tests.loop import runs
from tests.loop.adapters import trained_parameters
from tests.models.test_training_form import CLASSES, inputs, load

ALL = ["all-linear", "convolutions"]
FAMILIES = ["sd", "kandinsky-prior", "kandinsky-decoder", "wuerstchen"]


def options(family: str, **values) -> TrainConfig:
    return TrainConfig(family=family, pretrained_model_name_or_path="model", lora_rank=4, seed=3, **values)


def adapted(family, model, published, **values) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A published model with PEFT's adapters, none of them zero, and the same in training form."""
    config = options(family, **values)
    theirs, ours = load(family, model, published), load(family, model, published)
    trained_parameters(theirs, config)
    add_adapters(ours, CLASSES[family][2], config, seed=3)
    assert all(
        torch.equal(one, other) for one, other in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
    )
    for each in (theirs, ours):
        generator = torch.Generator().manual_seed(5)
        for name, parameter in each.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    to_training_form(ours, SHIPPED)
    return theirs, ours


def run(model, arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and gradients of what is trained."""
    torch.manual_seed(11)  # of dropout
    output = model(*arguments[0], **arguments[1])
    output = output if torch.is_tensor(output) else output[0]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(output.square().sum(), trained.values(), materialize_grads=True)
    return output.detach(), dict(zip(trained, gradients, strict=True))


CASES = [
    *((family, {}) for family in FAMILIES),
    ("kandinsky-prior", {"lora_targets": ["to_q", "to_v"], "lora_alpha": 2.0}),
    ("sd", {"lora_targets": ALL, "use_dora": True, "lora_alpha": 8.0}),
    ("wuerstchen", {"lora_targets": ALL, "lora_alpha": 8.0}),
    ("kandinsky-prior", {"lora_dropout": 0.3, "use_dora": True}),
    ("sd", {"lora_dropout": 0.3, "lora_targets": ["attn1.to_q", "ff.net.2"]}),
]


@pytest.mark.parametrize(("family", "values"), CASES, ids=str)
def test_output_and_gradients_are_those_of_pefts_layers(family, values, model, published):
    theirs, ours = adapted(family, model, published, **values)
    output, gradients = run(ours, inputs(family, ours))
    expected, expected_gradients = run(theirs, inputs(family, theirs))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    gradients = dict(to_published_form(ours, gradients.items()))
    expected_gradients = {name.replace(".default", ""): value for name, value in expected_gradients.items()}
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        size = float(expected.abs().max())
        torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-4 * size + 1e-6, msg=name)
    back = dict(to_published_form(ours, ours.named_parameters()))
    for name, parameter in theirs.named_parameters():
        assert torch.equal(back[name.replace(".base_layer", "").replace(".default", "")], parameter), name
    alpha = values.get("lora_alpha", 4)
    assert alphas_of(ours) == {name.partition(".lora_A")[0]: alpha for name in gradients if ".lora_A" in name}


def test_projections_are_stacked_where_adapters_allow_it(model, published):
    _, plain = adapted("sd", model, published)
    stacked = [module for module in plain.modules() if isinstance(module, AdaptedLinear) and len(module.places) > 1]
    attentions = [module for module in plain.modules() if isinstance(module, FusedAttention)]
    assert len(stacked) == len(attentions) > 0
    for values in ({"lora_dropout": 0.1}, {"use_dora": True}):
        _, apart = adapted("sd", model, published, **values)
        assert not any(isinstance(module, FusedAttention) for module in apart.modules())


def test_what_is_frozen_keeps_nothing_for_a_gradient(model, published):
    _, unet = adapted("sd", model, published)
    results = {}
    for name in ("conv_in", "down_blocks.0", "up_blocks.1.resnets.0.conv2"):
        unet.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: results.update({name: (inputs, output)})
        )
    positional, named = inputs("sd", unet)
    unet(*positional, **named)
    outputs = [
        output[0] if isinstance(output, tuple) else output for _, output in (results["conv_in"], results["down_blocks.0"])
    ]
    assert not any(output.requires_grad for output in outputs)  # before the first adapter
    convolution = unet.get_submodule("up_blocks.1.resnets.0.conv2")
    assert isinstance(convolution, ChannelsLastConv2d)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        convolution(results["up_blocks.1.resnets.0.conv2"][0][0].detach().requires_grad_())
    assert kept == [convolution.weight.shape]


@pytest.mark.parametrize("values", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_adapters_compile_into_one_graph(values, model, published):
    torch._dynamo.reset()
    _, prior = adapted("kandinsky-prior", model, published, **values)
    plain, _ = run(prior, inputs("kandinsky-prior", prior))
    compiled, _ = run(torch.compile(prior, backend="eager", fullgraph=True), inputs("kandinsky-prior", prior))
    torch.testing.assert_close(compiled, plain)
    _, unet = adapted("sd", model, published, lora_targets=["time_emb_proj" if not values else "conv1"], **values)
    convolution = unet.get_submodule("up_blocks.1.resnets.0.conv1")
    x = torch.randn(1, 48, 4, 4, requires_grad=True)
    ours, theirs = torch.compile(convolution, backend="aot_eager", fullgraph=True)(x), convolution(x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), x)[0] for each in (ours, theirs)))


def test_targets_are_names_patterns_and_kinds(model, published, capsys):
    unet = load("sd", model, published)
    names = adapted_layers(unet, ["down_blocks.*.attn1.to_q", "conv_in"])
    assert names[0] == "conv_in"
    assert len(names) > 1
    assert all(name.endswith("attn1.to_q") and name.startswith("down_blocks") for name in names[1:])
    linear = {name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert set(adapted_layers(unet, ["all-linear"])) == linear
    assert set(chosen_layers(unet, "unet", options("sd", lora_targets=["conv_in", "to_kk"]))) == {"conv_in"}
    assert "--lora_targets to_kk: no linear layer or convolution of the model has such a name" in capsys.readouterr().err
    with pytest.raises(UserError, match="--lora_targets to_x: no linear layer or convolution of the model has such a name"):
        adapted_layers(unet, ["to_x"])


def test_an_adapter_that_could_not_learn_is_refused_and_operations_are_counted_without_its_file(model, published, tmp_path):
    unet, path = load("sd", model, published), tmp_path / "lora.safetensors"
    shapes = {"A": (4, *unet.conv_in.weight.shape[1:]), "B": (len(unet.conv_in.weight), 4, 1, 1)}
    tensors = {f"unet.conv_in.lora_{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    config = runs.config(model, tmp_path, tmp_path, tmp_path, lora_rank=4, lora_weights=str(path))
    write_adapter(path, Adapter(tensors, {"unet.conv_in": 0.0}), "kohya")
    with pytest.raises(UserError, match="the alpha of unet.conv_in is 0, with which it learns nothing"):
        chosen_layers(unet, "unet", config)
    write_adapter(path, Adapter(tensors, {"unet.conv_in": 2.0}), "kohya")
    family = open_family(config)
    trained = family.load_model()
    path.unlink()
    with warnings.catch_warnings(action="error"):
        assert step_flops(family, trained) > 0
