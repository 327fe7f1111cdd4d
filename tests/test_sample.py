"""Drawing from trained pipelines, compiled and not."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

from engine import drawable, sample
from engine.errors import UserError, exit_code
from engine.models import drawing
from engine.models.adapter import DOWN, UP, Adapter, adaptable, adaptable_layers, write_adapter
from engine.models.drawing import draw
from engine.models.pipelines import open_pipeline
from engine.models.schedulers import SAMPLERS, parse_scheduler, schedulers_of, use_scheduler
from engine.models.training_form import FusedAttention
from engine.prompts import Wanted, read_prompts
from tests.models.test_check import change, write_safety_checker

HALVES = {
    "sd": ("pretrained_model_name_or_path", None),
    "kandinsky-prior": ("pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"),
    "wuerstchen": ("pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"),
}
# Sampling steps, in tokens and pixels that the tiny models have.
ARGUMENTS = {
    "sd": {"height": 16, "width": 16, "num_inference_steps": 2},
    "kandinsky-prior": {"height": 32, "width": 32, "num_inference_steps": 2, "prior_num_inference_steps": 2},
    "wuerstchen": {"height": 128, "width": 128, "num_inference_steps": 2, "prior_num_inference_steps": 2},
}


@pytest.fixture(autouse=True)
def commands_draw_on_the_cpu(monkeypatch):
    """As the pipelines do that their images are compared with."""
    device = sample._device
    monkeypatch.setattr(sample, "_device", lambda name: device(name or "cpu"))


@pytest.fixture(scope="module")
def opened(published):
    """Whole pipelines by family, each opened once."""
    kept = {}

    def open_family(family):
        if family not in kept:
            ours, other = (published(family)[name] if name else None for name in HALVES[family])
            kept[family] = open_pipeline(ours, other, torch.float32)
            kept[family].set_progress_bar_config(disable=True)
            if family == "wuerstchen":  # whose decoder begins by looking at noise alone
                torch.manual_seed(0)
                for weight in kept[family].decoder.parameters():
                    if not weight.any():
                        nn.init.normal_(weight, std=0.3)
        return kept[family]

    return open_family


def pixels(pipeline, wanted, batch_size=1, **arguments) -> np.ndarray:
    """What is drawn, as numbers, in the order of what was wanted."""
    drawn = dict(draw(pipeline, wanted, batch_size, **arguments))
    return np.stack([np.asarray(drawn[place], float) for place in range(len(wanted))])


@pytest.mark.parametrize("family", HALVES)
def test_all_that_draws_is_one_compiled_graph_each_and_in_the_form_of_training(family, published, monkeypatch):
    """Graph breaks raise; what inductor would make of the graphs is torch's."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, options, **others: compiler(call, backend=backend, **others))
    ours, other = (published(family)[name] if name else None for name in HALVES[family])
    pipeline = open_pipeline(ours, other, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = [Wanted("a cat", 0), Wanted("a cat", 1), Wanted("a dog", 2)]
    before = pixels(pipeline, wanted, 2, **ARGUMENTS[family])
    drawing.speed_up(pipeline)
    drawing.compile_models(pipeline, 1)
    after = pixels(pipeline, wanted, 2, fill=True, **ARGUMENTS[family])
    assert abs(after - before).max() <= 1
    assert len(compiled) == (2 if family == "sd" else 3)


@pytest.mark.parametrize(("capability", "ours"), [((9, 0), True), ((7, 5), False)])
def test_short_attention_draws_where_it_trains(capability, ours, published, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    halves = (published("kandinsky-prior")[name] for name in HALVES["kandinsky-prior"])
    prior = open_pipeline(*halves, torch.float32).prior_prior
    drawing.speed_up(SimpleNamespace(components={"prior_prior": prior}, device=torch.device("cuda")))
    attentions = [module for module in prior.modules() if isinstance(module, FusedAttention)]
    assert attentions
    assert all(module.may_be_short == ours for module in attentions)


@pytest.mark.gpu
@pytest.mark.parametrize("family", HALVES)
def test_images_replayed_from_graphs_are_those_of_single_kernels(family, published):
    ours, other = (published(family)[name] if name else None for name in HALVES[family])
    pipeline = open_pipeline(ours, other, torch.float32).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    wanted = [Wanted("a cat", 0), Wanted("a cat", 1), Wanted("a dog", 2)]
    before = pixels(pipeline, wanted, 2, **ARGUMENTS[family])
    drawing.speed_up(pipeline)
    drawing.compile_models(pipeline, 1)
    for _ in range(2):  # the first calls run as they are, and are captured
        assert abs(pixels(pipeline, wanted, 2, fill=True, **ARGUMENTS[family]) - before).max() <= 1
    torch._dynamo.reset()


def test_results_of_compiled_models_stay_when_the_next_are_written_over_them():
    place = torch.zeros(2)
    call = drawing._kept(lambda x: {"sample": place.fill_(x)})
    first = call(1.0)
    call(2.0)
    assert first["sample"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("family", HALVES)
@pytest.mark.parametrize("negative", [None, "ugly"])
def test_images_are_the_same_for_any_batch_size(family, negative, opened):
    pipeline, words = opened(family), ("a cat", "a dog", "a very long prompt " * 9)
    wanted = [Wanted(word, seed, negative) for word in words for seed in (5, 6)]
    # The tiny decoder of Wuerstchen makes black and white of whatever it is given.
    given = ARGUMENTS[family] | ({"output_type": "latent"} if family == "wuerstchen" else {})
    alone = pixels(pipeline, wanted, 1, **given)
    assert len({image.tobytes() for image in alone}) == len(wanted)
    rounding = 1e-3 * abs(alone).max() if family == "wuerstchen" else 1
    for batch_size, fill in ((4, False), (4, True), (6, False)):
        assert abs(pixels(pipeline, wanted, batch_size, fill=fill, **given) - alone).max() <= rounding


def test_one_image_is_that_of_the_pipeline_and_its_seed(opened):
    for family in HALVES:
        pipeline = opened(family)
        own = pipeline("a cat", generator=torch.Generator().manual_seed(3), **ARGUMENTS[family]).images[0]
        assert np.array_equal(pixels(pipeline, [Wanted("a cat", 3)], **ARGUMENTS[family])[0], np.asarray(own))


def test_images_of_several_shapes_come_in_batches_of_one_each(opened, monkeypatch):
    pipeline, sizes = opened("sd"), []
    wanted = [Wanted("a", n, width=width, height=16, steps=2) for n, width in enumerate((16, 32, 16, 32, 16))]
    batch = drawing._draw_batch
    monkeypatch.setattr(
        drawing, "_draw_batch", lambda pipeline, some, given: sizes.append(len(some)) or batch(pipeline, some, given)
    )
    drawn = dict(draw(pipeline, wanted, 2, fill=True))
    assert sizes == [2, 2, 2]
    assert [drawn[n].size for n in range(5)] == [(16, 16), (32, 16), (16, 16), (32, 16), (16, 16)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_scheduler_draws_the_same_for_any_batch_size(name, model):
    pipeline = open_pipeline(model, None, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    plain = pixels(pipeline, [Wanted("a", 1, steps=3)])
    use_scheduler(pipeline, name)
    wanted = [Wanted("a", seed, steps=3) for seed in (1, 2, 3)]
    alone = pixels(pipeline, wanted)
    assert abs(pixels(pipeline, wanted, 3) - alone).max() <= 1
    assert name in ("ddpm", "euler_a") or not np.array_equal(alone[0], plain[0])


@pytest.mark.parametrize(
    ("text", "meant"),
    {
        "DDIM": ("ddim", None), "euler a": ("euler_a", None), "k_euler_a": ("euler_a", None),
        "Euler Ancestral": ("euler_a", None),
        "DPM++ 2M Karras": ("dpm++_2m", "karras"), "dpmpp_2m_sde_karras": ("dpm++_2m_sde", "karras"),
        "DPMSolverMultistepScheduler": ("dpm++_2m", None), "dpmsolver++": ("dpm++_2m", None), "uni-pc": ("unipc", None),
        "UniPCMultistepScheduler": ("unipc", None), "k_dpm_2_a": ("dpm2_a", None), "plms": ("pndm", None), "LCM": ("lcm", None),
    }.items(),
)  # fmt: skip
def test_schedulers_have_the_names_that_people_know(text, meant):
    assert parse_scheduler(text) == meant


def test_kandinsky_samples_with_what_serves_its_decoder(published):
    ours, other = (published("kandinsky-prior")[name] for name in HALVES["kandinsky-prior"])
    pipeline = open_pipeline(ours, other, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for name in schedulers_of(pipeline):
        use_scheduler(pipeline, name)
        assert pixels(pipeline, [Wanted("a", 1)], **ARGUMENTS["kandinsky-prior"]).std() > 1


def test_less_memory_is_asked_for_where_it_is_short(model, monkeypatch, capsys):
    pipeline = open_pipeline(model, None, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = [Wanted("a", seed, steps=2) for seed in range(4)]
    before, decode, failures = pixels(pipeline, wanted), pipeline.vae.decode, iter([True] * 4)

    def short(*given, **named):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return decode(*given, **named)

    monkeypatch.setattr(pipeline.vae, "decode", short)
    assert abs(pixels(pipeline, wanted, 4) - before).max() <= 1
    said = capsys.readouterr().err
    for words in ("decoded one by one", "2 at a time", "1 at a time", "in tiles"):
        assert f"{words}" in said
    assert pipeline.vae.use_slicing
    assert pipeline.vae.use_tiling


def test_a_lack_of_memory_that_nothing_helps_is_said(model, tmp_path, monkeypatch, capsys):
    def short(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("diffusers.AutoencoderKL.decode", short)
    arguments = ["--model", str(model), "--prompts", "x", "--num_inference_steps", "1", "--output", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", ["sample", *arguments])
    assert exit_code("engine.sample", sample.main) == 2
    assert "out of memory: CUDA out of memory" in capsys.readouterr().err


def test_files_of_prompts_say_what_each_image_is(model, tmp_path, monkeypatch, capsys):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text(
        "\ufeff# a comment\na cat --n ugly --ss euler_a --d 7 --fs 3.1 --w 32 --h 16 --s 3 --l 2\n\na d\u00f6g\n",
        encoding="utf-8",
    )
    lines.write_text(
        '{"prompt": "a", "seed": 5, "size": 32, "steps": 1, "guidance": 3, "negative_prompt": "b", "images": 2}\n'
        '"only words"\n{"prompt": "c", "size": "16x32", "seed": null, "steps": 4.0}\n'
        '{"prompt": "d", "size": [32.0, 16], "num_inference_steps": 2}\n'
    )
    usual = Wanted("", 1, None, 16, 16, 4, 5.0)
    assert read_prompts([str(text), "words"], usual, 1) == [
        [Wanted("a cat", 7, "ugly", 32, 16, 3, 2.0)], [Wanted("a d\u00f6g", 1, None, 16, 16, 4, 5.0)],
        [Wanted("words", 1, None, 16, 16, 4, 5.0)],
    ]  # fmt: skip
    assert read_prompts([str(lines)], usual, 1) == [
        [Wanted("a", 5, "b", 32, 32, 1, 3.0), Wanted("a", 6, "b", 32, 32, 1, 3.0)],
        [Wanted("only words", 1, None, 16, 16, 4, 5.0)],
        [Wanted("c", 1, None, 16, 32, 4, 5.0)],
        [Wanted("d", 1, None, 32, 16, 2, 5.0)],
    ]
    grid = tmp_path / "out" / "grid.png"
    words = ["--model", str(model), "--prompts", str(text), str(lines), "--images_per_prompt", "1",
             "--num_inference_steps", "1", "--resolution", "16", "--scheduler", "dpm++ 2m karras", "--output", str(grid),
             "--batch_size", "4"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sample", *words])
    monkeypatch.setattr(sample, "_MOST_SHOWN", 2)
    assert sample.main() == 0
    said = capsys.readouterr().err
    assert "--ss euler_a is passed over" in said
    assert "show the first 2 of 6 prompts" in said
    images = [Image.open(path) for path in sorted(grid.parent.glob("grid-*.png"))]
    assert [image.size for image in images] == [(32, 16), (16, 16), (32, 32), (32, 32), (16, 16), (16, 32), (32, 16)]
    assert images[0].text["parameters"] == (
        "a cat\nNegative prompt: ugly\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2.0, Seed: 7, "
        f"Size: 32x16, Model: {model.name}"
    )
    settings = json.loads(images[1].text["settings"])
    assert settings["prompt"] == "a d\u00f6g"
    assert {"seed": 0, "steps": 1, "precision": "fp32", "guidance_scale": 7.5}.items() <= settings.items()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "fine\na cat --d x", "line 2: seed is 'x', no number"),
        ("p.txt", "a cat --w 3", "line 1: width must be at least 8"),
        ("p.txt", "a cat --ar 3", "line 1: unknown switch --ar; there are --n, --d, --w, --h, --s, --l"),
        ("p.txt", "# nothing\n\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read"),
        ("p.txt", "a\0b", "line 1: prompt 'a\\\\x00b' holds a NUL"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3: "),
        ("p.jsonl", "[1]", "line 1: write an object"),
        ("p.jsonl", '{"seed": 1}', "line 1: no prompt"),
        ("p.jsonl", '{"prompt": "a", "seeds": 1}', "line 1: unknown key seeds; there are prompt, "),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed is true, no number"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompt is 3, no text"),
        ("p.jsonl", '{"prompt": "a", "size": "big"}', "line 1: size is 'big', no size"),
        ("p.jsonl", '{"prompt": "a", "size": [1, 2, 3]}', "line 1: size"),
        ("p.jsonl", '{"prompt": "a", "guidance": NaN}', "line 1: guidance_scale must be at least 0, not nan"),
        ("p.jsonl", "[" * 100_000, "line 1: "),
        ("p.txt", None, "No such file"),
        ("p.csv", "prompt\na", "prompts are read from .txt and .jsonl"),
    ],
)
def test_bad_lines_of_prompts_are_named_by_number(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        read_prompts([str(tmp_path / name)], Wanted(""), 1)
    assert str(raised.value).startswith(f"--prompts {tmp_path / name}: ")
    assert said.replace("\\\\", "\\") in str(raised.value)


def test_the_command_compiles_where_it_is_told_to(model, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(options) or call)
    words = ["--images_per_prompt", "2", "--resolution", "16", "--batch_size", "2"]
    assert draw_with(monkeypatch, model, tmp_path, *words) == 0
    plain = np.asarray(Image.open(tmp_path / "a.png"))
    assert not compiled
    assert draw_with(monkeypatch, model, tmp_path, *words, "--compile") == 0
    assert compiled == [{"fullgraph": True, "dynamic": False, "options": {}}] * 2
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), plain)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> list[Path]:
    """Two files of LoRA weights for the tiny pipeline."""
    pipeline, paths = open_pipeline(model, None, torch.float32), []
    for number in range(2):
        torch.manual_seed(number)
        layers = {
            name: layer for name, layer in adaptable_layers(adaptable(pipeline)).items() if name.endswith(("to_q", "to_v"))
        }
        tensors = {}
        for name, layer in layers.items():
            tensors[name + DOWN] = 4 * torch.randn(2, layer.in_features)
            tensors[name + UP] = torch.randn(layer.out_features, 2)
        paths.append(tmp_path_factory.mktemp("adapters") / f"look-{number}.safetensors")
        write_adapter(paths[-1], Adapter(tensors, dict.fromkeys(layers, 2.0)))
    return paths


def test_adapters_are_drawn_with_at_their_scales(model, adapters, tmp_path, monkeypatch):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    plain = pixels(pipeline, [Wanted("a", 0, steps=1)])
    for path, name in zip(adapters, ("x", "y"), strict=True):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(["x", "y"], [0.5, 1.0])
    theirs = pixels(pipeline, [Wanted("a", 0, steps=1)])
    assert abs(theirs - plain).max() > 8
    draw_with(monkeypatch, model, tmp_path, "--lora", f"{adapters[0]}:0.5", str(adapters[1]))
    image = Image.open(tmp_path / "a-0000.png")
    assert json.loads(image.text["settings"])["lora"] == [[str(adapters[0]), 0.5], [str(adapters[1]), 1]]
    assert abs(np.asarray(image, float) - theirs[0]).max() <= 1
    assert image.text["parameters"].startswith("a <lora:look-0:0.5> <lora:look-1:1>\nSteps: 1, ")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("none.safetensors", "no such file or folder"),
        ("text.safetensors", "damaged"),
        ("text.safetensors:0.5", "damaged"),
    ],
)
def test_an_adapter_that_is_none_is_named(file, said, model, tmp_path, monkeypatch):
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UserError, match=f"^{tmp_path}/{file.partition(':')[0]}: .*{said}"):
        draw_with(monkeypatch, model, tmp_path, "--lora", str(tmp_path / file))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "run.v2.safetensors", "renamed.safetensors"])
def test_the_adapter_of_a_training_that_ended_is_drawn_with(name, model, adapters, tmp_path, monkeypatch):
    run = tmp_path / "run.v2"
    write_run(run, model, (1,))
    shutil.copy(adapters[0], run / name)
    for path in (run, run / name):
        found = drawable.locate("--model", path)
        assert found.pipeline == model
        assert found.name == ("renamed" if name.startswith("renamed") else "run.v2")
    draw_with(monkeypatch, run, tmp_path, "--lora", f"{run / name}:2")
    image = Image.open(tmp_path / "a-0000.png")
    settings = json.loads(image.text["settings"])
    assert settings["pipeline"] == str(model)
    assert [scale for _, scale in settings["lora"]] == [1, 2]
    again = ["--lora", *(f"{path}:{scale}" for path, scale in settings["lora"])]
    draw_with(monkeypatch, settings["pipeline"], tmp_path / "again", *again)
    assert np.array_equal(numbers(tmp_path / "again" / "a-0000.png"), np.asarray(image, float))


def test_adapters_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / place / "out" / "pytorch_lora_weights.safetensors" for place in ("a", "b")]
    assert drawable.told_apart([drawable.call(path) for path in paths], paths) == [
        f"{place}/out/pytorch_lora_weights.safetensors" for place in ("a", "b")
    ]


def write_run(run, model, steps, ema=True) -> None:
    """An output directory of a training that has not ended: checkpoints with models of other weights, and a configuration."""
    for step in steps:
        for number, name in enumerate(("unet", "unet_ema") if ema else ("unet",)):
            unet = UNet2DConditionModel.from_pretrained(model / "unet")
            with torch.no_grad():
                unet.conv_out.bias += 10 * step + number
            unet.save_pretrained(run / f"checkpoint-{step}" / name)
    (run / "latest").write_text(f"checkpoint-{steps[-1]}")
    (run / "config.toml").write_text(f'family = "sd"\npretrained_model_name_or_path = "{model}"\n')


def compare_with(monkeypatch, directory, *words) -> int:
    usual = ["--prompts", "a", "b", "--images_per_prompt", "1", "--num_inference_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["sample", *usual, "--output", str(directory / "a.png"), *map(str, words)])
    return sample.main()


def numbers(path) -> np.ndarray:
    return np.asarray(Image.open(path), float)


def test_models_are_compared_from_the_same_noise(model, adapters, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, model, (1,))
    assert compare_with(monkeypatch, out, "--model", model, "--compare", model, run, adapters[0]) == 0
    drawn = [numbers(out / f"a-{side}-0000.png") for side in range(3)]
    assert drawn[0].shape == drawn[1].shape
    assert all(abs(drawn[0] - other).max() > 4 for other in drawn[1:])
    draw_with(monkeypatch, model, tmp_path)
    assert np.array_equal(numbers(tmp_path / "a-0000.png"), drawn[0])
    with Image.open(out / "a.gif") as fading:
        assert fading.n_frames > 3 * 4
    assert Image.open(out / "a.png").width > 3 * 144


def test_the_checkpoints_of_a_training_are_a_strip(model, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, model, (2, 10))
    assert [one.name for one in drawable.compared([run], None)] == ["step 2", "step 10"]
    assert drawable.locate("--model", run / "checkpoint-2").parts == {"unet": run / "checkpoint-2" / "unet_ema"}
    assert compare_with(monkeypatch, out, "--compare", run) == 0
    draw_with(monkeypatch, run / "checkpoint-10", tmp_path)
    assert np.array_equal(numbers(tmp_path / "a-0000.png"), numbers(out / "a-1-0000.png"))
    assert not np.array_equal(numbers(out / "a-0-0000.png"), numbers(out / "a-1-0000.png"))


def test_names_of_what_is_compared_tell_them_apart(model, tmp_path):
    paths = [tmp_path / name / "out" for name in ("a", "b")]
    for path in paths:
        shutil.copytree(model, path)
    assert [one.name for one in drawable.compared(paths, None)] == ["a/out", "b/out"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "RUN"], "--compare RUN: give two models, or the output directory of a training with .*; it has 1"),
        (["--compare", "none"], "--compare none: give two models, .*; there is no such directory"),
        (["--compare", "MODEL", "none"], "--compare none: no such directory"),
        (["--compare", "MODEL", "LOST/checkpoint-1"], "give the pipeline that it was trained from as --model"),
        (["--model", "LOST/checkpoint-1"], "as --model, and this with --lora or --compare"),
        (["--model", "RUN/checkpoint-1", "--compare", "MODEL", "RUN"], "beneath what --compare names lies a whole pipeline"),
        ([], "--model is required"),
    ],
)
def test_what_cannot_be_compared_is_said(words, said, model, tmp_path, monkeypatch):
    write_run(tmp_path / "run", model, (1,), ema=False)
    write_run(tmp_path / "lost", model, (1,), ema=False)
    (tmp_path / "lost" / "config.toml").write_text('family = "sd"\npretrained_model_name_or_path = "someone/model"\n')
    places = {"RUN": tmp_path / "run", "LOST": tmp_path / "lost", "MODEL": model}
    for name, place in places.items():
        words, said = [word.replace(name, str(place)) for word in words], said.replace(name, str(place))
    with pytest.raises(UserError, match=said):
        compare_with(monkeypatch, tmp_path / "out", *words)


def test_a_checkpoint_of_another_model_is_refused(published, model, tmp_path, monkeypatch):
    write_run(tmp_path / "run", model, (1,))
    prior = published("wuerstchen")["pretrained_prior_model_name_or_path"]
    with pytest.raises(UserError, match="a WuerstchenPriorPipeline has no unet; give the pipeline that it was trained from"):
        compare_with(monkeypatch, tmp_path, "--model", prior, "--compare", tmp_path / "run" / "checkpoint-1", model)


def test_samples_are_drawn_into_a_labelled_grid(model, tmp_path, monkeypatch):
    grid = tmp_path / "grid.png"
    arguments = ["--model", str(model), "--prompts", "a red square", "a very long prompt " * 20, "--output", str(grid)]
    monkeypatch.setattr(sys, "argv", ["sample", *arguments, "--num_inference_steps", "2", "--images_per_prompt", "2"])
    assert sample.main() == 0
    assert Image.open(grid).width > 2 * 64


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "no model_index.json there; give the output directory of a training that ended"),
        (["latest"], "no model_index.json there; make a pipeline of the checkpoint with `python -m engine.checkpoint export`"),
        (["manifest.json"], "no model_index.json there; make a pipeline of the checkpoint"),
        (None, "no such directory; give the output directory"),
    ],
    ids=str,
)
def test_a_model_that_is_none_is_named(entries, said, tmp_path, monkeypatch):
    for entry in entries or ():
        (tmp_path / entry).touch()
    model = tmp_path / "none" if entries is None else tmp_path
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(model), "--prompts", "x"])
    with pytest.raises(UserError, match=f"^--model {model}: {said}"):
        sample.main()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--resolution", "33"], "--resolution 33: this model draws images in steps of 8 px; the nearest is 32"),
        (["--num_inference_steps", "1001"], "--num_inference_steps 1001: this model has 1000 timesteps"),
        (["--num_inference_steps", "0"], "--num_inference_steps: must be at least 1, not 0"),
        (["--images_per_prompt", "-1"], "--images_per_prompt: must be at least 1 and at most 1024, not -1"),
        (["--images_per_prompt", "1000000"], "--images_per_prompt: must be at least 1 and at most 1024"),
        (["--images_per_prompt", "two"], "--images_per_prompt: invalid"),
        (["--guidance_scale", "nan"], "--guidance_scale: must be at least 0, not nan"),
        (["--guidance_scale", "inf"], "--guidance_scale: must be at least 0, not inf"),
        (["--seed", str(2**64)], "--seed: must be at least"),
        (["--prompts", "a\udcff"], "is not UTF-8"),
        (["--output", "samples.jpg"], "--output samples.jpg: pictures are written as PNG"),
        (["--output", "/proc/no/x.png"], "--output /proc/no: cannot be written"),
        (["--other_half", "x"], "has no other half; leave out --other_half"),
        (["--resolution", "64x33"], "--resolution 64x33: this model draws images in steps of 8 px; the nearest is 32"),
        (["--resolution", "big"], "--resolution: invalid"),
        (["--scheduler", "DPM++ SDE Karras"], "unknown; the nearest is dpm++_2m_sde karras; there are ddim, "),
        (["--scheduler", "magic"], "--scheduler magic: unknown; there are ddim, "),
        (["--scheduler", "ddim karras"], "--scheduler ddim karras: ddim has no karras spacing; leave karras out"),
        (["--precision", "fp64"], "--precision: invalid choice"),
        (["--device", "toaster"], "--device toaster: "),
        (["--device", "meta"], "--device meta: it holds no numbers"),
        (["--prior_num_inference_steps", "3"], "--prior_num_inference_steps: this model has no prior; leave it out"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused_in_one_line(arguments, named, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(model), "--prompts", "x", *arguments])
    assert exit_code("engine.sample", sample.main) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ..."))  # of what takes long
    assert said.startswith("engine.sample: error: ")
    assert named in said


@pytest.mark.parametrize(("family", "wrong", "nearest"), [("wuerstchen", 100, 128), ("kandinsky-prior", 33, 32)])
def test_a_size_that_a_family_cannot_draw_is_not_drawn_as_another(family, wrong, nearest, published, monkeypatch):
    options = published(family)
    ours, other = (options[name] for name in HALVES[family])
    arguments = ["--model", ours, "--other_half", other, "--prompts", "x", "--resolution", str(wrong)]
    monkeypatch.setattr(sys, "argv", ["sample", *arguments])
    with pytest.raises(UserError, match=f"--resolution {wrong}: this model draws .* the nearest is {nearest}"):
        sample.main()


@pytest.mark.parametrize(
    ("family", "scheduler", "said"),
    [
        ("wuerstchen", "ddim", "samples with the schedule that it was trained on"),
        ("kandinsky-prior", "euler", "this model cannot be sampled with it; there are ddim, ddpm"),
    ],
)
def test_a_scheduler_that_a_family_cannot_use_is_refused(family, scheduler, said, published, monkeypatch):
    ours, other = (published(family)[name] for name in HALVES[family])
    monkeypatch.setattr(
        sys, "argv", ["sample", "--model", ours, "--other_half", other, "--prompts", "x", "--scheduler", scheduler]
    )
    with pytest.raises(UserError, match=f"^--scheduler {scheduler}: .*{said}"):
        sample.main()


def test_a_pipeline_with_a_damaged_part_is_named(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    monkeypatch.setattr(sys, "argv", ["sample", "--model", str(tmp_path / "model"), "--prompts", "x"])
    with pytest.raises(UserError, match="model.safetensors: truncated or damaged"):
        sample.main()


def test_a_size_that_nothing_is_trained_for_is_asked_for(model, tmp_path, monkeypatch):
    change(shutil.copytree(model, tmp_path / "model") / "unet" / "config.json", sample_size=2048)
    with pytest.raises(UserError, match=r"draws images of 4096 px; give --resolution"):
        draw_with(monkeypatch, tmp_path / "model", tmp_path)
    draw_with(monkeypatch, tmp_path / "model", tmp_path, "--resolution", "16")


def test_scales_and_sides_of_a_pipeline_are_bounded(published, model, tmp_path, monkeypatch):
    options = published("wuerstchen")
    for name, file, entry in (("prior", "pretrained_prior_model_name_or_path", "resolution_multiple"),
                              ("decoder", "pretrained_decoder_model_name_or_path", "latent_dim_scale")):  # fmt: skip
        change(shutil.copytree(options[file], tmp_path / name) / "model_index.json", **{entry: 1e-4})
        with pytest.raises(UserError, match=f"model_index.json: {entry} is 0.0001, far from"):
            draw_with(monkeypatch, tmp_path / name, tmp_path)
    write_safety_checker(shutil.copytree(model, tmp_path / "model"))
    change(tmp_path / "model" / "feature_extractor" / "preprocessor_config.json", do_pad=True, pad_size={"height": 16000})
    with pytest.raises(UserError, match=r"preprocessor_config.json: cannot be read: its height is 16000"):
        draw_with(monkeypatch, tmp_path / "model", tmp_path)
    options = published("kandinsky-prior")
    prior = shutil.copytree(options["pretrained_prior_model_name_or_path"], tmp_path / "kandinsky")
    change(prior / "prior" / "config.json", additional_embeddings=12000)
    with pytest.raises(UserError, match=r"its additional_embeddings is 12000, more than any model has"):
        draw_with(monkeypatch, prior, tmp_path)


def draw_with(monkeypatch, model, directory, *more) -> int:
    words = [
        "--model",
        model,
        "--prompts",
        "a",
        "--images_per_prompt",
        1,
        "--num_inference_steps",
        1,
        "--output",
        directory / "a.png",
    ]
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, words), *more])
    return sample.main()
