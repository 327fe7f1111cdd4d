"""Files of adapters: every form gives the same picture, here, in diffusers and in PEFT; what is damaged is refused."""

import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from engine import export
from engine.catalogue import LORA_WEIGHTS
from engine.errors import UserError
from engine.models.adapter import (
    DOWN,
    FORMATS,
    MAGNITUDE,
    OF_INPUTS,
    UP,
    Adapter,
    adaptable,
    adaptable_layers,
    load_into,
    read_adapter,
    write_adapter,
)
from engine.models.low_rank import closest, merge, merged
from engine.models.original_layout import unet_name
from engine.models.pipelines import combine
from engine.models.published import digest_folder
from examples.tiny_models import kandinsky_decoder, kandinsky_prior, stable_diffusion, wuerstchen_prior

PARTS = {"sd": "unet", "kandinsky-prior": "prior", "kandinsky-decoder": "unet", "wuerstchen": "prior"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    made = {
        "sd": stable_diffusion(folder / "spelling"), "kandinsky-prior": kandinsky_prior(folder / "spelling"),
        "kandinsky-decoder": kandinsky_decoder(), "wuerstchen": wuerstchen_prior(folder / "spelling"),
    }  # fmt: skip
    for name, pipeline in made.items():
        pipeline.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def open_(path: Path, **options):
    pipeline = DiffusionPipeline.from_pretrained(path, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline) -> np.ndarray:
    """What a pipeline makes of one prompt, or of an embedding, in units of its size."""
    kind = type(pipeline).__name__
    given = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    if kind == "StableDiffusionPipeline":
        return pipeline("a cat", height=16, width=16, **given).images
    if kind == "KandinskyV22Pipeline":
        embeds = {"image_embeds": torch.full((1, 24), 0.1), "negative_image_embeds": torch.zeros(1, 24)}
        return pipeline(**embeds, height=32, width=32, **given).images
    if kind == "KandinskyV22PriorPipeline":
        return pipeline("a cat", **given).image_embeds
    made = pipeline("a cat", height=512, width=512, **given).image_embeddings
    return made / np.abs(made).max()


def make_adapter(
    pipeline, parts: tuple[str, ...], which: str = "attention", dora: bool = False, seed: int = 1, alike: bool = False
) -> Adapter:
    """An adapter of PEFT's with random values, of rank 4 and alpha 3, and unless all are alike another one for some layers."""
    tensors, alphas = {}, {}
    torch.manual_seed(seed)
    for part in parts:
        model = deepcopy(adaptable(pipeline)[part])
        layers = [
            name for name, layer in model.named_modules() if can_have(layer) and (which == "all" or name.endswith(ATTENTION))
        ]
        options = {"rank_pattern": {layers[0]: 2}, "alpha_pattern": {layers[0]: 5.0, layers[1]: 6.0}}
        config = LoraConfig(
            r=4, lora_alpha=3.0, target_modules=layers, use_dora=dora, init_lora_weights=False, **({} if alike else options)
        )
        inject_adapter_in_model(config, model)
        for name, tensor in get_peft_model_state_dict(model).items():
            magnitude = name.endswith("lora_magnitude_vector")
            tensors[f"{part}.{name}{'.weight' if magnitude else ''}"] = tensor * (1.3 if magnitude else 0.5)
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_alpha"):
                alphas[f"{part}.{name}"] = float(layer.lora_alpha["default"])
    return Adapter(tensors, alphas)


def can_have(layer) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1


def write(directory: Path, adapter: Adapter, form: str, **about: str) -> Path:
    path = directory / form if form == "peft" else directory / form / LORA_WEIGHTS
    write_adapter(path, adapter, form, about)
    return path


def assert_same(left: Adapter, right: Adapter) -> None:
    assert left.alphas == right.alphas
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(tensor, right.tensors[name]) for name, tensor in left.tensors.items())


@pytest.mark.parametrize(("which", "dora"), [("attention", False), ("attention", True), ("all", False)])
@pytest.mark.parametrize("family", PARTS)
def test_every_form_gives_one_picture_here_in_the_libraries_and_merged(pipelines, family, which, dora, tmp_path):
    plain = open_(pipelines[family])
    parts = (PARTS[family], "text_encoder") if family == "sd" else (PARTS[family],)
    adapter = make_adapter(plain, parts, which, dora)
    for form in FORMATS:
        assert_same(read_adapter(write(tmp_path, adapter, form), adaptable(plain)), adapter)

    before = drawn(plain)
    load_into(plain, adapter)
    wanted = drawn(plain)
    assert np.abs(wanted - before).max() > 0.02
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    merge(pipelines[family], [(adapter, 1.0)], tmp_path / "merged")
    np.testing.assert_allclose(drawn(open_(tmp_path / "merged")), wanted, **tolerance)

    library = open_(pipelines[family])
    if hasattr(library, "load_lora_weights"):
        library.load_lora_weights(str(tmp_path / "diffusers"), weight_name=LORA_WEIGHTS)
    else:
        model = adaptable(library)[PARTS[family]]
        model.load_lora_adapter(str(tmp_path / "diffusers"), prefix=PARTS[family], weight_name=LORA_WEIGHTS)
    np.testing.assert_allclose(drawn(library), wanted, **tolerance)

    library = open_(pipelines[family])
    for part in parts:
        folder = tmp_path / "peft" / (part if len(parts) > 1 else "")
        setattr(library, part, PeftModel.from_pretrained(adaptable(library)[part], str(folder)).base_model.model)
    np.testing.assert_allclose(drawn(library), wanted, **tolerance)


def test_diffusers_reads_kohyas_form_of_what_kohya_adapts(pipelines, tmp_path):
    plain = open_(pipelines["sd"])
    adapter = make_adapter(plain, ("unet",), alike=True)
    write(tmp_path, adapter, "kohya", ss_sd_model_name="tiny")
    load_into(plain, adapter)
    library = open_(pipelines["sd"])
    library.load_lora_weights(str(tmp_path / "kohya"), weight_name=LORA_WEIGHTS)
    np.testing.assert_allclose(drawn(library), drawn(plain), atol=1e-4)
    with safe_open(tmp_path / "kohya" / LORA_WEIGHTS, "pt") as opened:
        said = opened.metadata()
    names = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_sd_model_name")
    assert [said[name] for name in names] == ["networks.lora", "4", "3.0", "tiny"]


def test_several_adapters_add_up_by_their_scales(pipelines, tmp_path):
    adapters = [make_adapter(open_(pipelines["sd"]), ("unet",), seed=seed) for seed in (1, 2)]
    beside = open_(pipelines["sd"])
    for name, adapter, scale in zip("ab", adapters, (0.5, -0.7), strict=True):
        load_into(beside, adapter, scale, name)
    merge(pipelines["sd"], list(zip(adapters, (0.5, -0.7), strict=True)), tmp_path / "merged")
    np.testing.assert_allclose(drawn(open_(tmp_path / "merged")), drawn(beside), atol=1e-4)
    assert not any(parameter.requires_grad for parameter in beside.unet.parameters() if parameter.dim() == 2)
    nothing = open_(pipelines["sd"])
    load_into(nothing, adapters[0], 0.0)
    np.testing.assert_array_equal(drawn(nothing), drawn(open_(pipelines["sd"])))


def test_a_whole_pipeline_has_the_layers_of_its_halves(pipelines):
    prior, decoder = (open_(pipelines[name]) for name in ("kandinsky-prior", "kandinsky-decoder"))
    adapters = make_adapter(prior, ("prior",)), make_adapter(decoder, ("unet",))
    whole = combine(prior, decoder)
    assert {*adaptable(whole)} == {"unet", "prior", "text_encoder"}
    for adapter in adapters:
        load_into(whole, adapter)
    for name, part in (("kandinsky-prior", whole.prior_pipe), ("kandinsky-decoder", whole.decoder_pipe)):
        half = open_(pipelines[name])
        load_into(half, adapters[name == "kandinsky-decoder"])
        part.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(drawn(part), drawn(half))


def _underscored(layer: str) -> str:
    return layer.replace(".", "_")


def _old(layer: str) -> str:
    """As diffusers' attention processors had it, without a part."""
    path, name = layer.split(".", 1)[1].rsplit(".to_" if ".to_" in layer else ".add_", 1)
    return f"{path}.processor.{'to' if '.to_' in layer else 'add'}_{name.removesuffix('.0')}_lora"


def _one_trainers(layer: str) -> str:
    """OneTrainer's for ComfyUI: Stable Diffusion's original names."""
    part, path = layer.split(".", 1)
    if part == "text_encoder":
        return f"text_encoders.clip_l.transformer.text_model.{path.removeprefix('text_model.')}"
    return f"diffusion_model.{unet_name(path, 1, [True, False])}"


def _kohyas_original(layer: str) -> str:
    return _underscored(f"lora_unet.{unet_name(layer.removeprefix('unet.'), 1, [True, False])}")


def _bare(layer: str) -> str:
    return layer.split(".", 1)[1]


KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight", ".alpha"), (".lora_A.weight", ".lora_B.weight", ".alpha")
SPELLINGS = {  # what stands before the suffixes, and these; without the last the file says nothing of alpha
    "onetrainer comfy": (_one_trainers, PEFT),
    "onetrainer original": (lambda layer: _one_trainers(layer).removeprefix("diffusion_model."), PEFT),
    "onetrainer diffusers": (str, KOHYA),
    "kohya original": (_kohyas_original, KOHYA),
    "lycoris": (lambda layer: f"lycoris_{_underscored(_bare(layer))}", KOHYA),
    "first diffusers": (_old, (".down.weight", ".up.weight", "")),
    "second diffusers": (str, (".lora.down.weight", ".lora.up.weight", "")),
    "peft": (lambda layer: f"base_model.model.{_bare(layer)}", (".lora_A.default.weight", ".lora_B.default.weight", "")),
}


@pytest.mark.parametrize(
    ("family", "spelling"),
    [(family, name) for name in SPELLINGS for family in PARTS if family == "sd" or not name.endswith(("comfy", "original"))],
)
def test_the_names_of_other_trainers_are_read(pipelines, family, spelling, tmp_path):
    named, (down, up, alpha) = SPELLINGS[spelling]
    pipeline = open_(pipelines[family])
    parts = (PARTS[family], "text_encoder") if "comfy" in spelling else (PARTS[family],)
    adapter = make_adapter(pipeline, parts)
    tensors = {}
    for layer, value in adapter.alphas.items():
        tensors[named(layer) + down] = adapter.tensors[layer + DOWN]
        tensors[named(layer) + up] = adapter.tensors[layer + UP]
        if alpha:
            tensors[named(layer) + alpha] = torch.tensor(value, dtype=torch.float16)
    save_file(tensors, tmp_path / "theirs.safetensors")
    if alpha:
        assert_same(read_adapter(tmp_path / "theirs.safetensors", adaptable(pipeline)), adapter)
    else:  # these say nothing of alpha: it is the rank
        ranks = {layer: float(adapter.rank(layer)) for layer in adapter.alphas}
        assert_same(read_adapter(tmp_path, adaptable(pipeline)), Adapter(adapter.tensors, ranks))


def test_weights_of_8_bits_are_read_in_16(pipelines, tmp_path):
    pipeline = open_(pipelines["sd"])
    adapter = make_adapter(pipeline, ("unet",))
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in adapter.tensors.items()}
    described = {"unet.r": 4, "unet.lora_alpha": 3}
    save_file(eight, tmp_path / "small.safetensors", {"lora_adapter_metadata": json.dumps(described)})
    found = read_adapter(tmp_path / "small.safetensors", adaptable(pipeline))
    assert all(torch.equal(found.tensors[name], tensor.half()) for name, tensor in eight.items())
    write_adapter(tmp_path / "again.safetensors", found, "kohya")


def test_old_names_of_the_text_encoder_and_a_pickle(pipelines, tmp_path):
    pipeline = open_(pipelines["sd"])
    adapter = make_adapter(pipeline, ("text_encoder",))
    tensors = {}
    for layer in adapter.alphas:
        path = layer.removeprefix("text_encoder.").removeprefix("text_model.")
        for end, way in ((DOWN, "down"), (UP, "up")):
            old = (
                path.replace("q_proj", "to_q").replace("k_proj", "to_k").replace("v_proj", "to_v").replace("out_proj", "to_out")
            )
            tensors[f"text_encoder.text_model.{old}_lora.{way}.weight"] = adapter.tensors[layer + end]
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    ranks = {layer: float(adapter.rank(layer)) for layer in adapter.alphas}
    assert_same(read_adapter(tmp_path, adaptable(pipeline)), Adapter(adapter.tensors, ranks))


def test_what_a_configuration_says_of_alpha(pipelines, tmp_path):
    """As SimpleTuner writes it into the metadata, and PEFT beside the file, with rank-stabilised LoRA."""
    pipeline = open_(pipelines["sd"])
    adapter = make_adapter(pipeline, ("unet",))
    first, *others = adapter.alphas
    path = first.removeprefix("unet.")
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {path: 1}, "unet.use_rslora": True, "unet.bias": "none"}
    save_file(dict(adapter.tensors), tmp_path / "tuned.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    found = read_adapter(tmp_path / "tuned.safetensors", adaptable(pipeline)).alphas
    assert found == pytest.approx({first: math.sqrt(2), **{layer: 8 * math.sqrt(adapter.rank(layer)) for layer in others}})
    for alteration in ({"unet.alpha_pattern": {"(a+)+$": 1}}, {"unet.lora_alpha": "8"}, {"unet.init_lora_weights": "pissa"}):
        save_file(
            dict(adapter.tensors), tmp_path / "tuned.safetensors", {"lora_adapter_metadata": json.dumps(said | alteration)}
        )
        with pytest.raises(UserError, match="alpha_pattern|the alpha of|begins from other weights"):
            read_adapter(tmp_path / "tuned.safetensors", adaptable(pipeline))


def test_tuckers_decomposition_and_scales_of_inputs(pipelines, tmp_path):
    """LyCORIS's convolutions in three pieces, and OneTrainer's DoRA, which has a length for every input."""
    pipeline = open_(pipelines["sd"])
    conv, linear = pipeline.unet.down_blocks[0].resnets[0].conv1, pipeline.unet.time_embedding.linear_1
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, 16, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(16, 3, 1, 1)
    name, other = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_time_embedding_linear_1"
    lengths = torch.rand(1, linear.in_features) + 0.5
    tensors = {
        f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0), f"{other}.lora_down.weight": torch.randn(2, 16),
        f"{other}.lora_up.weight": torch.randn(linear.out_features, 2), f"{other}.dora_scale": lengths,
        "bundle_emb.cat.emb": torch.zeros(2, 24),
    }  # fmt: skip
    save_file(tensors, tmp_path / "pieces.safetensors")
    adapter = read_adapter(tmp_path / "pieces.safetensors", adaptable(pipeline), of_inputs=True)
    change = merged(conv.weight.detach(), "unet.down_blocks.0.resnets.0.conv1", adapter, 1.0) - conv.weight.detach()
    pieces = torch.einsum("oabc,axyz,xide->oiyz", up[..., None, None].squeeze(-1).squeeze(-1), mid, down)
    assert torch.allclose(change, 2 / 3 * pieces, atol=1e-5)

    layer = "unet.time_embedding.linear_1"
    whole = linear.weight.detach() + adapter.tensors[layer + UP] @ adapter.tensors[layer + DOWN]
    wanted = lengths * whole / whole.norm(dim=0, keepdim=True)
    assert torch.allclose(merged(linear.weight.detach(), layer, adapter, 1.0), wanted, atol=1e-5)
    write_adapter(tmp_path / "again.safetensors", adapter, "kohya")
    assert_same(read_adapter(tmp_path / "again.safetensors", adaptable(pipeline), of_inputs=True), adapter)
    assert [name for name in adapter.tensors if name.endswith((OF_INPUTS, MAGNITUDE))] == [layer + OF_INPUTS]
    with pytest.raises(UserError, match="its DoRA is of inputs"):
        load_into(pipeline, adapter)
    with pytest.raises(UserError, match=r"again\.safetensors: its DoRA is of inputs"):
        read_adapter(tmp_path / "again.safetensors", adaptable(pipeline))


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ZEROS = {LAYER + DOWN: torch.zeros(4, 32), LAYER + UP: torch.zeros(32, 4)}
WRONG = {
    "another width": (ZEROS | {LAYER + DOWN: torch.zeros(4, 320)}, r"its down is \[4, 320\].*takes \['rank', 32\]"),
    "another rank": (ZEROS | {LAYER + UP: torch.zeros(32, 8)}, r"its up is \[32, 8\]"),
    "rank 0": ({LAYER + DOWN: torch.zeros(0, 32), LAYER + UP: torch.zeros(32, 0)}, "its down is"),
    "half": ({LAYER + DOWN: torch.zeros(4, 32)}, "has no lora_up; the file is incomplete"),
    "not finite": (ZEROS | {LAYER + DOWN: torch.full((4, 32), math.nan)}, "not finite"),
    "whole numbers": (ZEROS | {LAYER + DOWN: torch.zeros(4, 32, dtype=torch.int64)}, "int64"),
    "small whole numbers": (ZEROS | {LAYER + DOWN: torch.zeros(4, 32, dtype=torch.int8)}, "int8"),
    "two alphas": (ZEROS | {LAYER + ".alpha": torch.zeros(2)}, "its alpha is"),
    "no scale": (ZEROS | {LAYER + ".dora_scale": torch.zeros(7, 1)}, "its magnitude is"),
    "twice": (ZEROS | {LAYER.removeprefix("unet.") + DOWN: torch.zeros(4, 32)}, "twice"),
    "another model": ({"unet.nothing.to_q" + DOWN: torch.zeros(4, 32)}, "has no layer unet.nothing.to_q; .*another model"),
    "sdxl": (
        {f"lora_te2_layer_{n}.lora_down.weight": torch.zeros(4, 32) for n in range(3)}, "and 2 more; .*Stable Diffusion XL"
    ),
    "loha": ({"lora_unet_mid_block.hada_w1_a": torch.zeros(4, 4)}, "LoHa and no LoRA"),
    "a model": ({"conv_in.weight": torch.zeros(4, 4)}, "something else and no LoRA"),
    "nothing": ({}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_adapter_of_the_model_is_refused_in_a_line(pipelines, wrong, tmp_path):
    tensors, said = WRONG[wrong]
    save_file(tensors, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=said) as refused:
        read_adapter(tmp_path / "theirs.safetensors", adaptable(open_(pipelines["sd"])))
    assert "theirs.safetensors" in refused.value.lines[0]
    assert len(refused.value.lines) == 1


def test_an_adapter_of_the_text_encoder_too_is_not_read_in_part(pipelines, tmp_path):
    pipeline = open_(pipelines["sd"])
    for form in ("diffusers", "kohya"):
        file = write(tmp_path, make_adapter(pipeline, ("unet", "text_encoder")), form)
        with pytest.raises(UserError, match="adapts the text encoder too, .*--train_text_encoder"):
            read_adapter(file, {"unet": pipeline.unet})


def test_files_that_are_damaged_or_hold_programs_are_refused(pipelines, tmp_path):
    parts = adaptable(open_(pipelines["sd"]))
    adapter = make_adapter(open_(pipelines["sd"]), ("unet",))
    file = write(tmp_path, adapter, "diffusers")
    file.write_bytes(file.read_bytes()[:-100])
    torch.save({"a": print}, tmp_path / "programs.bin")
    for path, said in (
        (file, "truncated or damaged"), (tmp_path / "programs.bin", "programs beside tensors"),
        (tmp_path / "none", "no such file"), (tmp_path, "no LoRA weights there"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            read_adapter(path, parts)
    for name in ("a", "b"):
        save_file(dict(adapter.tensors), tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds a\.safetensors and 1 more; name the file"):
        read_adapter(tmp_path, parts)


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["engine.export", *map(str, arguments)])
    return export.main()


def test_the_command_merges_and_keeps_all_else_to_the_bit(pipelines, tmp_path, monkeypatch):
    base = tmp_path / "base"
    open_(pipelines["sd"]).to(torch.float16).save_pretrained(base)
    adapter = make_adapter(open_(base), ("unet",))
    write_adapter(tmp_path / "style.safetensors", adapter, "kohya")
    before = digest_folder(base)
    merging = ("--model", base, "--merge", tmp_path / "style.safetensors")
    out = tmp_path / "new" / "out"
    run(monkeypatch, *merging, "--scale", 0.5, "--output", out)
    assert digest_folder(base) == before
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in base.iterdir())
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert digest_folder(out / part) == digest_folder(base / part)
    assert (out / "unet" / "config.json").read_bytes() == (base / "unet" / "config.json").read_bytes()
    old, new = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (base, out))
    assert old.keys() == new.keys()
    changed = {f"{layer.removeprefix('unet.')}.weight" for layer in adapter.alphas}
    for name, tensor in new.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, old[name]) == (name not in changed)

    run(monkeypatch, *merging, "--dtype", "fp32", "--output", tmp_path / "fp32")
    for part in ("unet", "vae", "text_encoder"):
        file = next((tmp_path / "fp32" / part).glob("*.safetensors"))
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {torch.float32}
    assert not [*tmp_path.rglob("*.partial")]


@pytest.mark.parametrize(("variant", "safe"), [("fp16", True), (None, False)])
def test_the_command_merges_into_divided_files_variants_and_pickles(pipelines, variant, safe, tmp_path, monkeypatch):
    base, adapted = tmp_path / "base", open_(pipelines["sd"])
    adapted.save_pretrained(base, variant=variant)
    for file in (base / "unet").glob("*.safetensors"):
        file.unlink()
    adapted.unet.save_pretrained(base / "unet", safe_serialization=safe, variant=variant, max_shard_size="100KB")
    assert len([*(base / "unet").iterdir()]) > 3
    adapter = make_adapter(adapted, ("unet", "text_encoder"))
    write_adapter(tmp_path / "style.safetensors", adapter)
    options = ("--variant", variant) if variant else ()
    run(monkeypatch, "--model", base, "--merge", tmp_path / "style.safetensors", "--output", tmp_path / "out", *options)
    load_into(adapted, adapter)
    np.testing.assert_allclose(drawn(open_(tmp_path / "out", variant=variant)), drawn(adapted), atol=1e-3)


@pytest.mark.parametrize("family", PARTS)
def test_what_is_extracted_is_what_was_merged(pipelines, family, tmp_path, monkeypatch, capsys):
    adapter = make_adapter(open_(pipelines[family]), (PARTS[family],), "all")
    merge(pipelines[family], [(adapter, 1.0)], tmp_path / "tuned")
    arguments = ("--extract", "--model", tmp_path / "tuned", "--base", pipelines[family])
    run(monkeypatch, *arguments, "--rank", 4, "--save_format", "kohya", "--output", tmp_path / "found.safetensors")
    assert "keeps 100.0% of the squared difference" in capsys.readouterr().err
    plain = open_(pipelines[family])
    found = read_adapter(tmp_path / "found.safetensors", adaptable(plain))
    assert found.alphas.keys() == adapter.alphas.keys()
    load_into(plain, found)
    np.testing.assert_allclose(drawn(plain), drawn(open_(tmp_path / "tuned")), rtol=1e-3, atol=1e-3)


def test_the_closest_product_is_the_singular_vectors():
    for shape in ((12, 30), (30, 12), (8, 4, 3, 3), (6, 6)):
        difference = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        down, up, left = closest(difference, 3)
        u, values, v = torch.linalg.svd(difference.flatten(1).double(), full_matrices=False)
        wanted = u[:, :3] * values[:3] @ v[:3]
        assert torch.allclose((up.flatten(1) @ down.flatten(1)).double(), wanted, atol=1e-5)
        assert left == pytest.approx(float(values[3:].square().sum()))
        assert torch.allclose(down.flatten(1).norm(dim=1).double(), values[:3].sqrt(), atol=1e-5)
    down, up, left = closest(torch.ones(2, 5), 9)
    assert (down.shape, up.shape, left) == ((2, 5), (2, 2), 0)
    assert torch.allclose(up @ down, torch.ones(2, 5), atol=1e-6)


def test_the_command_writes_an_adapter_in_another_form(pipelines, tmp_path, monkeypatch):
    pipeline = open_(pipelines["wuerstchen"])
    adapter = make_adapter(pipeline, ("prior",), dora=True)
    write_adapter(tmp_path / "a.safetensors", adapter)
    convert = ("--model", pipelines["wuerstchen"], "--lora")
    run(monkeypatch, *convert, tmp_path / "a.safetensors", "--save_format", "peft", "--output", tmp_path / "b")
    run(monkeypatch, *convert, tmp_path / "b", "--save_format", "kohya", "--output", tmp_path / "c.safetensors")
    run(monkeypatch, *convert, tmp_path / "c.safetensors", "--output", tmp_path / "d.safetensors")
    assert load_file(tmp_path / "d.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
    assert_same(read_adapter(tmp_path / "d.safetensors", adaptable(pipeline)), adapter)


def test_the_command_says_what_is_wrong_in_a_line(pipelines, tmp_path, monkeypatch):
    base, lora = pipelines["sd"], tmp_path / "a.safetensors"
    write_adapter(lora, make_adapter(open_(base), ("unet",)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    grouped = {
        "prior.blocks.0.depthwise" + DOWN: torch.zeros(32, 32, 3, 3),
        "prior.blocks.0.depthwise" + UP: torch.zeros(32, 1, 1, 1),
    }
    save_file(grouped, tmp_path / "grouped.safetensors")
    out = ("--output", tmp_path / "out")
    for arguments, said in (
        ((), "give one of --single_file, --merge, --extract, --lora"),
        (("--merge", lora, "--lora", lora, *out), "one thing is written at a time"),
        (("--merge", lora, "--rank", 4, *out), "--rank says nothing to --merge"),
        (("--merge", lora), "say with --output"),
        (("--merge", lora, "--output", tmp_path / "full"), "is there already"),
        (("--merge", lora, "--scale", 1, 2, *out), "2 of them for 1 adapters"),
        (("--lora", lora, *out), "give a name that ends in .safetensors"),
        (("--extract", "--output", tmp_path / "b.safetensors"), "name with --base"),
        (("--extract", "--base", base, "--output", tmp_path / "b.safetensors"), "no layer differs"),
        (("--extract", "--base", pipelines["wuerstchen"], "--output", tmp_path / "b.safetensors"), "another architecture"),
        (("--model", tmp_path, "--merge", lora, *out), "no model_index.json there"),
        (("--model", pipelines["kandinsky-prior"], "--merge", lora, *out), "the model has no layer unet"),
        (("--model", pipelines["wuerstchen"], "--merge", tmp_path / "grouped.safetensors", *out), "convolution of groups"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as refused:
            run(monkeypatch, "--model", base, *arguments)
        assert len(refused.value.lines) == 1
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.glob("out")]


def test_layers_are_found_beneath_adapters_too(pipelines):
    pipeline = open_(pipelines["sd"])
    before = [*adaptable_layers(adaptable(pipeline))]
    load_into(pipeline, make_adapter(pipeline, ("unet",), "all"))
    assert [*adaptable_layers(adaptable(pipeline))] == before
