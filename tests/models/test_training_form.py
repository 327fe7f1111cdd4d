"""The training form of a model computes what the published one computes, and turns back into it exactly."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UNet2DConditionModel
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.upsampling import Upsample2D
from diffusers.pipelines.wuerstchen import WuerstchenPrior
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint

from engine.models import training_form
from engine.models.lora import NAME
from engine.models.training_form import (
    SHIPPED,
    ActivatedLinear,
    ChannelsLastConv2d,
    ChannelsLastGradient,
    Channelwise,
    Form,
    FusedAttention,
    GatedLinear,
    GroupNorm,
    ResnetBlock,
    ResponseNorm,
    Transformer,
    Upsample,
    doubled,
    to_published_form,
    to_training_form,
)
from tests.loop.runs import published_order

CLASSES = {
    "sd": (UNet2DConditionModel, "pretrained_model_name_or_path", "unet"),
    "kandinsky-prior": (PriorTransformer, "pretrained_prior_model_name_or_path", "prior"),
    "kandinsky-decoder": (UNet2DConditionModel, "pretrained_decoder_model_name_or_path", "unet"),
    "wuerstchen": (WuerstchenPrior, "pretrained_prior_model_name_or_path", "prior"),
}


def load(family, model, published):
    cls, option, folder = CLASSES[family]
    models = {option: str(model)} if family == "sd" else published(family, dropout=0.0)
    return cls.from_pretrained(models[option], subfolder=folder).train()


def inputs(family: str, model) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = model.config
    if family == "sd":
        return (draw(2, 4, 8, 8), torch.tensor([3, 700]), draw(2, 7, config.cross_attention_dim)), {}
    if family == "kandinsky-prior":
        width, tokens = config.embedding_dim, config.num_embeddings
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[1, 5:] = False
        return (draw(2, width), torch.tensor([3, 700]), draw(2, width), draw(2, tokens, width), mask), {}
    if family == "kandinsky-decoder":
        condition = {"image_embeds": draw(2, config.encoder_hid_dim)}
        return (draw(2, 4, 8, 8), torch.tensor([3, 700]), None), {"added_cond_kwargs": condition}
    return (draw(2, config.c_in, 3, 3), torch.tensor([0.1, 0.9]), draw(2, 7, config.c_cond)), {}


def run(model, arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradients of its squares."""
    positional, named = arguments
    output = model(*positional, **named)
    output = output if torch.is_tensor(output) else output[0]
    model.zero_grad()
    output.square().sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("norms", "frozen"), [("torch", ()), ("kernel", ()), ("kernel", ("weight",)), ("torch", ("bias",))])
@pytest.mark.parametrize("family", CLASSES)
def test_output_and_gradients_are_those_of_the_published_model(family, norms, frozen, model, published, monkeypatch):
    theirs, ours = load(family, model, published), load(family, model, published)
    for name, parameter in (*theirs.named_parameters(), *ours.named_parameters()):
        parameter.requires_grad_(not name.endswith(frozen))
    to_training_form(ours, SHIPPED)
    monkeypatch.setattr(training_form, "fuses", lambda norm, x: norms == "kernel")
    expected, expected_gradients = run(theirs, inputs(family, theirs))
    output, gradients = run(ours, inputs(family, ours))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    gradients = dict(to_published_form(ours, gradients.items()))
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        size = float(expected.abs().max())
        torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-4 * size + 1e-5, msg=name)


@pytest.mark.parametrize("family", CLASSES)
def test_the_published_form_comes_back_exactly(family, model, published):
    theirs, ours = load(family, model, published), load(family, model, published)
    to_training_form(ours, SHIPPED)
    kinds = {type(module) for module in ours.modules()}
    decoder = {ChannelsLastConv2d, FusedAttention, ResnetBlock, Upsample}
    expected = {"sd": decoder | {Transformer, GatedLinear}, "kandinsky-prior": {FusedAttention, ActivatedLinear},
                "kandinsky-decoder": decoder,
                "wuerstchen": {ChannelsLastConv2d, FusedAttention, Channelwise, ResponseNorm}}[family]  # fmt: skip
    assert expected <= kinds
    parameters = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    back, start = dict(to_published_form(ours, parameters.items())), dict(theirs.named_parameters())
    assert back.keys() == start.keys()
    assert all(torch.equal(back[name], start[name]) for name in start)
    flat = {name: parameter.reshape(-1) for name, parameter in parameters.items()}
    assert all(torch.equal(value, start[name]) for name, value in published_order(theirs, flat).items())


@pytest.mark.parametrize("compiled", [False, True])
def test_doubling_in_a_compiled_model_is_interpolation_with_the_same_gradient(compiled):
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(2, 3, 8, 10)
    ours = (torch.compile(doubled) if compiled else doubled)(image)
    theirs = F.interpolate(image, scale_factor=2.0, mode="nearest")
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*(torch.autograd.grad(y, image, gradient)[0] for y in (ours, theirs)))


def test_a_convolution_is_given_its_gradient_channels_last():
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    convolved, seen = image * 2, []
    convolved.register_hook(seen.append)
    ChannelsLastGradient.apply(convolved).backward(torch.ones(2, 3, 4, 5))
    assert [gradient.is_contiguous(memory_format=torch.channels_last) for gradient in seen] == [True]
    assert torch.equal(image.grad, torch.full_like(image, 2))


def test_projections_stay_apart_for_another_attention(model, published):
    unet = load("sd", model, published)
    to_training_form(unet, Form(projections=False))
    assert not any(isinstance(module, FusedAttention) for module in unet.modules())
    assert training_form.form_of(unet) == Form(projections=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_prior_attends_from_its_stacked_projection_as_from_three(compiled, model, published, monkeypatch):
    prior = load("kandinsky-prior", model, published)
    to_training_form(prior, SHIPPED)
    arguments = inputs("kandinsky-prior", prior)
    expected, expected_gradients = run(prior, arguments)
    monkeypatch.setattr(training_form, "is_short", lambda attention, projected, mask: mask is not None)
    torch._dynamo.reset()
    output, gradients = run(torch.compile(prior, fullgraph=True, backend="aot_eager") if compiled else prior, arguments)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        expected = expected_gradients[name.removeprefix("_orig_mod.")]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_attention_is_short_on_a_gpu_among_few_tokens(model, published):
    prior = load("kandinsky-prior", model, published)
    to_training_form(prior, SHIPPED)
    attention = next(module for module in prior.modules() if isinstance(module, FusedAttention))

    def short(tokens: int = 81, size: int = 64, gpu: bool = True, mask: torch.Tensor | None = None) -> bool:
        shape = torch.Size((2, tokens, 3 * attention.heads * size))
        return training_form.is_short(attention, SimpleNamespace(shape=shape, is_cuda=gpu, dtype=torch.bfloat16), mask)

    assert not short()  # until it is said that the GPU is one for it
    attention.may_be_short = True
    assert short()
    assert short(mask=torch.zeros(2, 1, 81))
    assert not any((short(tokens=129), short(size=8), short(gpu=False)))
    others = torch.zeros(2, 1, 81, requires_grad=True), torch.ones(2, 1, 81, dtype=torch.bool), torch.zeros(2, 1, 80)
    assert not any(short(mask=mask) for mask in others)


@pytest.mark.parametrize("fused", [True, False])
def test_norms_are_our_kernel_in_a_compiled_model_where_the_form_says_so(fused, model, published, monkeypatch):
    unet = load("sd", model, published)
    to_training_form(unet, Form(norms_when_compiled=fused))
    on_a_gpu = SimpleNamespace(is_cuda=True)
    assert training_form.form_of(unet) == Form(norms_when_compiled=fused)
    norms = [module for module in unet.modules() if isinstance(module, GroupNorm)]
    assert norms
    assert all(training_form.fuses(norm, on_a_gpu) for norm in norms)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [training_form.fuses(norm, on_a_gpu) for norm in norms] == [fused] * len(norms)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("family", "kind"), [("sd", GatedLinear), ("kandinsky-prior", ActivatedLinear)])
def test_activations_are_our_kernel_in_a_compiled_model_where_the_form_says_so(
    fused, family, kind, model, published, monkeypatch
):
    trained, form = load(family, model, published), Form(activations_when_compiled=fused)
    to_training_form(trained, form)
    assert training_form.form_of(trained).activations_when_compiled == fused
    activations = [module for module in trained.modules() if isinstance(module, kind)]
    assert activations
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [training_form.fuses(module, SimpleNamespace(is_cuda=True)) for module in activations] == [fused] * len(activations)
    assert not any(training_form.fuses(module, torch.ones(1)) for module in activations)


ACTIVATIONS = [(GEGLU, GatedLinear), (GELU, ActivatedLinear)]


@pytest.mark.parametrize(("published_kind", "kind"), ACTIVATIONS)
def test_an_activation_on_a_cpu_has_the_published_bits(published_kind, kind):
    theirs = torch.nn.ModuleList([published_kind(8, 16)])
    ours = copy.deepcopy(theirs)
    to_training_form(ours, SHIPPED)
    assert type(ours[0]) is kind
    results = [run(module[0], ((torch.linspace(-3, 3, 24).view(3, 8),), {})) for module in (theirs, ours)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


def test_another_gelu_stays_as_it_is():
    model = torch.nn.ModuleList([GELU(8, 16, approximate="tanh")])
    to_training_form(model, SHIPPED)
    assert type(model[0]) is GELU


@pytest.mark.parametrize(("published_kind", "kind"), ACTIVATIONS)
def test_an_adapted_activation_compiles_into_one_graph_and_is_recomputed(published_kind, kind, monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.ModuleList([published_kind(8, 16)]).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(target_modules=["proj"], r=2, init_lora_weights=False), layer, NAME)
    x = torch.linspace(-3, 3, 24).view(3, 8)
    expected, gradients = run(layer[0], ((x,), {}))
    to_training_form(layer, SHIPPED)
    monkeypatch.setattr(training_form, "fuses", lambda module, x: True)
    torch._dynamo.reset()

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer[0], x, use_reentrant=False)

    for function in (layer[0], recomputed, torch.compile(recomputed, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        output = function(x)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        found = [parameter.grad.flatten() for parameter in layer.parameters() if parameter.grad is not None]
        wanted = [gradient.flatten() for gradient in gradients.values()]
        torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "linear"), [("sd", False), ("sd", True), ("kandinsky-decoder", False)])
def test_activations_stay_channels_last(family, linear, model, published):
    """At 64 samples, from where on diffusers upsamples in contiguous memory; with both projections of transformers."""
    config = load(family, model, published).config
    unet = UNet2DConditionModel.from_config(config, use_linear_projection=linear).train()
    to_training_form(unet, SHIPPED)
    seen = {}

    def look(module, arguments, output):
        images = [t for t in (*arguments, output) if torch.is_tensor(t) and t.dim() == 4 and min(t.shape[1:]) > 1]
        seen.setdefault(type(module), set()).update(t.is_contiguous(memory_format=torch.channels_last) for t in images)

    for name, module in unet.named_modules():
        if name not in ("", "conv_in"):  # which take the samples as they come
            module.register_forward_hook(look)
    positional, named = inputs(family, unet)
    sample, timesteps, context = positional
    named = {name: {key: value.repeat(32, 1) for key, value in kept.items()} for name, kept in named.items()}
    context = None if context is None else context.repeat(32, 1, 1)
    unet(sample.repeat(32, 1, 1, 1), timesteps.repeat(32), context, **named)
    assert {ResnetBlock, Upsample, *([Transformer] if family == "sd" else [])} <= seen.keys()
    assert [kind for kind, kept in seen.items() if False in kept] == []


@pytest.mark.parametrize("size", [None, (7, 9)])
@pytest.mark.parametrize("convolution", [True, False])
def test_upsampling_gives_the_published_numbers_in_the_memory_format_of_its_input(size, convolution):
    torch.manual_seed(0)
    theirs = Upsample2D(3, use_conv=convolution)
    ours = copy.deepcopy(theirs)
    to_training_form(ours, SHIPPED)
    assert type(ours) is Upsample
    x = torch.randn(64, 3, 4, 5).to(memory_format=torch.channels_last)
    output, expected = ours(x, size), theirs(x, size)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)


def test_a_transformer_with_linear_projections_computes_the_published_numbers(model, published):
    theirs = UNet2DConditionModel.from_config(load("sd", model, published).config, use_linear_projection=True)
    ours = copy.deepcopy(theirs)
    to_training_form(ours, SHIPPED)
    positional, _ = inputs("sd", ours)
    torch.testing.assert_close(ours(*positional)[0], theirs(*positional)[0], rtol=1e-4, atol=1e-5)


def test_a_wuerstchen_prior_takes_timesteps_in_fp32():
    prior = WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=8, depth=1, nhead=2)
    to_training_form(prior, SHIPPED)
    prior.bfloat16()
    timesteps = torch.tensor([0.1234567])
    predicted = prior(torch.randn(1, 4, 4, 4).bfloat16(), timesteps, torch.randn(1, 3, 16).bfloat16())
    assert predicted.dtype == torch.bfloat16


def small_prior(dropout: float, gradient_checkpointing: bool = False) -> WuerstchenPrior:
    """With weights of the response norms, which begin as zeros."""
    torch.manual_seed(0)
    prior = WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=8, depth=1, nhead=2, dropout=dropout)
    for name, parameter in prior.named_parameters():
        if name.endswith(("gamma", "beta")):
            torch.nn.init.normal_(parameter)
    if gradient_checkpointing:
        prior.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    return prior.train()


def run_seeded(model, small_prior: WuerstchenPrior) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    output, _ = run(model, inputs("wuerstchen", small_prior))
    return output, {name: parameter.grad for name, parameter in small_prior.named_parameters()}


def test_a_residual_block_drops_what_the_published_one_drops_on_a_cpu():
    theirs, ours = small_prior(0.3), small_prior(0.3)
    for parameter, published in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, published)
    to_training_form(ours, SHIPPED)
    channelwise, published = ours.blocks[0].channelwise, theirs.blocks[0].channelwise
    x = torch.randn(2, 3, 3, 16)
    for training in (True, False):
        outputs = []
        for module in (channelwise.train(training), published.train(training)):
            torch.manual_seed(5)
            outputs.append(module(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_fused_dropout_is_the_same_compiled_and_recomputed(gradient_checkpointing, monkeypatch):
    """In one graph; drawn from torch's generator, so that other seeds drop others, and nothing drops in evaluation."""
    monkeypatch.setattr(training_form, "fuses", lambda norm, x: True)
    plain, prior = small_prior(0.3), small_prior(0.3, gradient_checkpointing)
    for model in (plain, prior):
        to_training_form(model, SHIPPED)
    output, gradients = run_seeded(plain, plain)
    torch._dynamo.reset()
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")
    for model in (prior, compiled):
        same, same_gradients = run_seeded(model, prior)
        torch.testing.assert_close(same, output)
        for name, gradient in gradients.items():
            torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    torch._dynamo.reset()
    assert not torch.allclose(run(plain, inputs("wuerstchen", plain))[0], output)
    prior.eval()
    assert torch.equal(*(run(prior, inputs("wuerstchen", prior))[0] for _ in range(2)))


@pytest.mark.parametrize("fused", [True, False])
def test_response_norms_are_our_kernel_in_a_compiled_model_where_the_form_says_so(fused, monkeypatch):
    prior = small_prior(0.1)
    to_training_form(prior, Form(activations_when_compiled=fused))
    assert training_form.form_of(prior).activations_when_compiled == fused
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert training_form.fuses(prior.blocks[0].channelwise[2], SimpleNamespace(is_cuda=True)) == fused
    assert not training_form.fuses(prior.blocks[0].channelwise[2], torch.ones(1))


def test_a_prior_whose_layers_have_adapters_fuses_between_them(monkeypatch):
    prior = small_prior(0.0)
    expected = prior(*inputs("wuerstchen", prior)[0])
    prior.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(target_modules=["channelwise.0", "channelwise.4"], r=2), prior, NAME)
    to_training_form(prior, SHIPPED)
    monkeypatch.setattr(training_form, "fuses", lambda norm, x: True)
    output = prior(*inputs("wuerstchen", prior)[0])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    learned = {name.split("channelwise.")[1][:8] for name, p in prior.named_parameters() if p.grad is not None}
    assert {kind[0] for kind in learned} == {"0", "4"}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_small_prior_computes_on_a_gpu_what_it_computes_on_a_cpu(compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    theirs, ours = small_prior(0.0), small_prior(0.0)
    expected, expected_gradients = run(theirs, inputs("wuerstchen", theirs))
    to_training_form(ours, SHIPPED)
    positional, _ = inputs("wuerstchen", ours)
    ours.cuda()
    torch._dynamo.reset()
    model = torch.compile(ours, fullgraph=True) if compiled else ours
    model(*(tensor.cuda() for tensor in positional)).square().sum().backward()
    torch.testing.assert_close(model(*(tensor.cuda() for tensor in positional)).cpu(), expected, rtol=1e-3, atol=1e-3)
    found = dict(to_published_form(ours, ((name, parameter.grad) for name, parameter in ours.named_parameters())))
    for name, gradient in expected_gradients.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[name].cpu(), gradient, rtol=1e-2, atol=1e-2 * size + 1e-4, msg=name)
    torch._dynamo.reset()
