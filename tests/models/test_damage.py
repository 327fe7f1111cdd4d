"""Whatever stands in the files of a model: one line with its name, before anything is encoded, and never a trace or a wait."""

import contextlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel, VQModel
from safetensors.torch import load_file, save_file
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from transformers import CLIPTextModel

from engine.catalogue import DECODER, FAMILIES, MODEL, PRIOR
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.models import single_file
from engine.models.check import check_weights, load_model
from engine.models.efficientnet import read_weights
from engine.models.family import open_family
from engine.models.original_layout import write_single_file
from engine.models.published import digest_folder, digest_parts
from engine.models.single_file import open_single_file
from engine.models.weights import NotFinite, read_tensors, require_finite
from tests.models.test_check import RESOLUTION, change
from tests.models.test_single_file import configuration

VALUES = [None, True, 0, -1, 7, 10**9, 10**18, 10**400, 0.5, 1e308, "", "\x1b[31m\nred", "x" * 5000, "../../etc", [], {}, [[]],
          [1], [10**9], ["a"], [None], {"a": 1}, "\ud800"]  # fmt: skip
CONTENTS = [b"", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"NaN", b'{"a":1,"a":2}', b"\0" * 9]


@pytest.fixture
def copied_model(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def open_whole(family: str, models: dict[str, str]) -> None:
    """Everything that a training and its export do with a model's files."""
    values = {"family": family, "resolution": RESOLUTION[family], "shards_dir": "unused", "validation_prompts": ["a"]}
    opened = open_family(TrainConfig.model_validate(values | models))
    opened.check_files()
    for name, digest in opened.encoding.encoder_digests().items():
        if family != "wuerstchen" or name != "image_encoder":  # which has its full size
            digest()
    model = opened.published_model()
    opened.pipeline({opened.part: model})
    opened.preview({opened.part: model})


def places(value: Any, at: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:9]) if isinstance(value, list) else ()
    return ([at] if at else []) + [place for key, one in inner for place in places(one, (*at, key))]


def mutate(file: Path, draw: random.Random) -> None:
    if draw.random() < 0.1:
        file.unlink()
        draw.choice([file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file),
                     lambda: None, lambda: file.symlink_to("/etc/passwd")])()  # fmt: skip
    elif file.suffix == ".json" and draw.random() < 0.8:
        whole = json.loads(file.read_text())
        *path, last = draw.choice([place for place in places(whole) if len(place) < 4])
        value = whole
        for key in path:
            value = value[key]
        value[last] = draw.choice(VALUES)
        file.write_text(json.dumps(whole))
    elif file.suffix == ".json" and draw.random() < 0.5:
        file.write_bytes(draw.choice(CONTENTS))
    else:
        content = bytearray(file.read_bytes())
        for _ in range(3):
            content[draw.randrange(min(len(content), 5000))] = draw.randrange(256)
        file.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])


@pytest.mark.parametrize("family", FAMILIES)
def test_mutated_folders_are_one_line(family, published, tmp_path):
    models = published(family)
    given = {option: models[option] for option in FAMILIES[family].classes}
    refused = 0
    for seed in range(12):
        draw = random.Random(f"{family} {seed}")
        option = draw.choice(sorted(given))
        folder = tmp_path / str(seed)
        shutil.copytree(given[option], folder)
        mutate(draw.choice(sorted(path for path in folder.rglob("*") if path.is_file())), draw)
        try:
            open_whole(family, models | {option: str(folder)})
        except UserError as error:
            (line,) = error.lines
            assert str(folder) in line
            refused += 1
    assert refused > 3


@pytest.mark.parametrize(("file", "changes"), [
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}), ("text_encoder/config.json", {"hidden_size": 10**9}),
    ("text_encoder/config.json", {"max_position_embeddings": 10**12}), ("text_encoder/config.json", {"eos_token_id": [1, 2]}),
    ("unet/config.json", {"layers_per_block": 10**9}), ("unet/config.json", {"transformer_layers_per_block": 10**9}),
    ("unet/config.json", {"block_out_channels": [10**9, 10**9]}), ("vae/config.json", {"layers_per_block": 10**9}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}), ("unet/config.json", {"in_channels": [[]]}),
    ("scheduler/scheduler_config.json", {"beta_start": 5.0}), ("vae/config.json", {"scaling_factor": "nn"}),
    ("scheduler/scheduler_config.json", {"quantization_config": "x"}), ("vae/config.json", {"block_out_channels": 3}),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**12}), ("unet/config.json", {"_diffusers_version": "x"}),
    ("tokenizer/tokenizer_config.json", {"more": "\ud800"}), ("unet/config.json", {"norm_eps": "x"}),
    ("model_index.json", {"requires_safety_checker": []}), ("unet/config.json", {"layers_per_block": 400_000_000}),
    ("vae/config.json", {"more": [1] * 20_000}), ("text_encoder/config.json", {"intermediate_size": 2**21}),
])  # fmt: skip
def test_numbers_that_ask_for_too_much_are_refused(file, changes, model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    change(tmp_path / "copy" / file, **changes)
    with pytest.raises(UserError, match=str(tmp_path / "copy")):
        open_whole("sd", {MODEL: str(tmp_path / "copy")})


def test_numbers_that_nothing_needs_cost_nothing(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    change(tmp_path / "copy" / "text_encoder" / "config.json", num_labels=10**12, per_layer_config={"1": 5}, id2label=None)
    open_whole("sd", {MODEL: str(tmp_path / "copy")})


def test_tokens_are_numbered_within_reason(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["model"]["vocab"]["J</w>"] = 10**9
    file.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="tokenizer: cannot be loaded: it gives a token the number 1000000000"):
        open_whole("sd", {MODEL: str(tmp_path / "copy")})


def test_an_image_processor_makes_images_of_the_encoders_size(published, tmp_path):
    models = published("kandinsky-prior")
    for changes in ({"size": {"shortest_edge": 10**9}}, {"crop_size": {"height": 10**9, "width": 10**9}}, {"size": []},
                    {"image_std": [0, 0, 0]}, {"do_pad": True, "pad_size": {"height": 16000, "width": 16000}},
                     {"image_mean": "x"}, {"crop_size": {"height": 16, "width": 16}}):  # fmt: skip
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(models[PRIOR], tmp_path / "copy")
        change(tmp_path / "copy" / "image_processor" / "preprocessor_config.json", **changes)
        with pytest.raises(UserError, match="image_processor"):
            open_whole("kandinsky-prior", models | {PRIOR: str(tmp_path / "copy")})


@pytest.mark.parametrize("names", [["../x.safetensors"], ["/etc/passwd"], [7], [], ["x" * 300], ["\0.bin"], ["model.py"]])
def test_pieces_lie_beside_the_index_that_names_them(names, model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    (weights,) = (tmp_path / "copy" / "unet").glob("*.safetensors")
    weights.rename(tmp_path / "copy" / "x.safetensors")
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {str(number): name for number, name in enumerate(names)}}))
    with pytest.raises(UserError, match=f"{index}: its weight_map names"):
        open_whole("sd", {MODEL: str(tmp_path / "copy")})


def test_names_of_any_bytes_have_a_digest(tmp_path):
    (tmp_path / os.fsdecode(b"\xff\xfe")).write_text("x")
    assert len(digest_folder(tmp_path)) == 64


@pytest.fixture(scope="module")
def single(model, tmp_path_factory) -> Path:
    """A single file without configurations."""
    directory = tmp_path_factory.mktemp("single")
    write_single_file(model, directory / "own.safetensors")
    return directory / "own.safetensors"


CHECKPOINTS: dict[str, Any] = {
    "a number": 5, "a list": [1], "a tensor": torch.zeros(3), "empty": {}, "other keys": {1: torch.zeros(1)},
    "numbers": {"model.diffusion_model.input_blocks.0.0.weight": 5}, "nested": {"state_dict": 5},
    "larger than the file": {"x": torch.zeros(1).expand(10**6, 10**6)},
}  # fmt: skip


@pytest.mark.parametrize("content", CHECKPOINTS)
def test_checkpoints_of_anything_else_are_one_line(content, model, tmp_path):
    for legacy in (False, True):
        torch.save(CHECKPOINTS[content], tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="x.ckpt"):
            open_single_file(tmp_path / "x.ckpt", configuration(tmp_path / "x.ckpt", model, tmp_path))
        torch.save({"effnet_state_dict": CHECKPOINTS[content]}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError):
            read_weights(str(tmp_path / "x.pt"), None)


def test_checkpoints_within_themselves_end(model, tmp_path):
    content: dict[str, Any] = {"x": torch.zeros(1)}
    content["state_dict"] = content
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="nested too deeply"):
        open_single_file(tmp_path / "x.ckpt", configuration(tmp_path / "x.ckpt", model, tmp_path))


def test_metadata_of_single_files_are_one_line(single, model, tmp_path):
    tensors, file = load_file(single), tmp_path / "x.safetensors"
    with single_file.safe_open(single, "pt") as opened:
        said = json.loads(opened.metadata()["diffusers"])
    for seed in range(12):
        draw, mutated = random.Random(seed), json.loads(json.dumps(said))
        part = draw.choice(["unet", "vae", "text_encoder", "scheduler", "pad_token"])
        if isinstance(mutated[part], dict) and draw.random() < 0.7:
            mutated[part][draw.choice(sorted(mutated[part]))] = draw.choice(VALUES)
        else:
            mutated[part] = draw.choice(VALUES)
        text = draw.choice([json.dumps(mutated)] * 5 + ["[" * 100_000])
        save_file(tensors, file, {"diffusers": text})
        with contextlib.suppress(UserError):
            folder = open_single_file(file, configuration(file, model, tmp_path))
            open_whole("sd", {MODEL: str(folder)})
    assert not list((tmp_path / "cache" / "single-files").glob("*.partial"))


@pytest.mark.parametrize("text", ["", "[" * 100_000, "a: &x [*x]", "!!python/object/apply:os.system ['false']", "model: 5",
                                  "model: {params: {unet_config: {params: {num_res_blocks: 1000000000}}}}", None])  # fmt: skip
def test_original_configurations_of_anything_else_are_one_line(text, single, model, tmp_path):
    file, given = tmp_path / "x.safetensors", tmp_path / "x.yaml"
    save_file(load_file(single), file, {"format": "pt"})
    given.write_text(text) if text is not None else os.mkfifo(given)
    with pytest.raises(UserError, match=r"--original_config .*x.yaml: not the YAML of a Stable Diffusion"):
        open_single_file(file, configuration(file, model, tmp_path, original_config=str(given)))


@pytest.mark.parametrize("made", ["__builtin__ bytearray", "torch FloatTensor", "torch.storage UntypedStorage"])
@pytest.mark.parametrize("archive", [True, False])
def test_pickles_make_tensors_alone(made, archive, tmp_path):
    """torch would take memory by the number that stands there."""
    called = b"c" + made.replace(" ", "\n").encode() + b"\n\x8a\x05" + (2 << 30).to_bytes(5, "little") + b"\x85R"
    content = b"\x80\x02}X\x01\x00\x00\x00a" + called + b"s."
    file = tmp_path / "x.bin"
    if archive:
        with zipfile.ZipFile(file, "w") as zipped:
            for entry, value in {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}.items():
                zipped.writestr(f"archive/{entry}", value)
    else:
        head = [pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True})]
        file.write_bytes(b"".join([*head, content, pickle.dumps([], 2)]))
    with pytest.raises(UserError, match=f"{file}: holds programs beside tensors"):
        read_tensors(file, "meta")


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as plain, zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert read_tensors(tmp_path / "x.bin")["x"].numel() == 10**6
    with pytest.raises(UserError, match="y.bin: truncated or damaged.*compressed"):
        read_tensors(tmp_path / "y.bin")


@pytest.mark.parametrize(
    ("part", "kind"), [("vae", AutoencoderKL), ("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_are_numbers(part, kind, value, copied_model):
    (file,) = (copied_model / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}: {name.replace('.', '[.]')} holds values that are not finite"):
        load_model(copied_model / part, kind, None, torch.bfloat16)
    with pytest.raises(NotFinite, match=f"{file}: .*{name} holds values that are not finite"):
        digest_parts(copied_model, {part: kind})[part]()


def test_finite_weights_of_any_size_and_kind_are_taken(tmp_path):
    largest = torch.finfo(torch.float32).max
    tensors = [torch.full((9,), largest), torch.full((9,), 65504.0).half(), torch.zeros(0), torch.ones(3, dtype=torch.int64)]
    require_finite(tmp_path, {str(number): tensor for number, tensor in enumerate(tensors)})
    require_finite(tmp_path, {"bfloat16": torch.ones(3).bfloat16(), "float8": torch.ones(3).to(torch.float8_e4m3fn), "step": 5})


def test_the_weights_that_are_loaded_are_those_that_were_compared(copied_model):
    """diffusers looks for other names, by the dots in a path among others."""
    folder = copied_model.rename(copied_model.with_name("v1.5")) / "vae"
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    kept = dict(tensors)
    kept.pop("encoder.conv_in.weight")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "other.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "other.safetensors")})
    (folder / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text(index)
    save_file(kept, folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(UserError, match=r"vae: the weights do not fit config.json: encoder.conv_in.weight is missing"):
        check_weights(folder, AutoencoderKL, "fp16")
    with pytest.raises(UserError, match=r"vae: cannot be loaded: encoder.conv_in.weight is missing"):
        load_model(folder, AutoencoderKL, "fp16", torch.float32)
    save_file(tensors, folder / "diffusion_pytorch_model.fp16.safetensors")
    check_weights(folder, AutoencoderKL, "fp16")
    loaded = load_model(folder, AutoencoderKL, "fp16", torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize(("option", "part", "model"), [
    (PRIOR, "prior", PriorTransformer), (DECODER, "movq", VQModel), (DECODER, "unet", UNet2DConditionModel),
])  # fmt: skip
def test_models_are_loaded_as_diffusers_does(option, part, model, dtype, published):
    folder = Path(published("kandinsky-prior")[option]) / part
    ours, theirs = load_model(folder, model, None, dtype), model.from_pretrained(folder, torch_dtype=dtype)
    tensors = [dict(itertools.chain(one.named_parameters(), one.named_buffers())) for one in (ours, theirs)]
    assert [(name, tensor.dtype, tensor.stride()) for name, tensor in tensors[0].items()] == [
        (name, tensor.dtype, tensor.stride()) for name, tensor in tensors[1].items()
    ]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert ours.config == theirs.config
    assert not ours.training
