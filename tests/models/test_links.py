"""What is read of a model lies in its folder: no link and no name in a tokenizer leads elsewhere; models may be shared."""

import json
import os
import shutil
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file

from engine.errors import UserError
from engine.models.check import check_pipeline, check_weights
from engine.models.pipelines import load_pipeline
from engine.models.published import digest_folder, read_scheduler, read_tokenizer
from tests.models.test_check import change


@pytest.fixture
def copy(model, tmp_path) -> Path:
    shutil.copytree(model, tmp_path / "copy")
    shutil.copytree(model, tmp_path / "private")
    return tmp_path / "copy"


@pytest.mark.parametrize(("file", "entries"), [
    ("tokenizer_config.json", {"fast_tokenizer_files": ["../../private/tokenizer/tokenizer.4.0.0.json"]}),
    ("tokenizer_config.json", {"vocab": "{private}/vocab.json", "merges": "{private}/merges.txt"}),
    ("tokenizer_config.json", {"vocab": "{private}/pipe"}), ("tokenizer_config.json", {"init_inputs": ["{private}/pipe"]}),
    ("tokenizer_config.json", {"tokenizer_file": "{private}/tokenizer.json"}),
    ("special_tokens_map.json", {"vocab": "{private}/pipe"}), ("special_tokens_map.json", {"vocab_file": "{private}/pipe"}),
    ("special_tokens_map.json", {"tokenizer_file": "{private}/tokenizer.json"}),
    ("special_tokens_map.json", {"gguf_file": "{private}/pipe"}),
])  # fmt: skip
def test_a_tokenizer_is_read_from_its_own_files_alone(file, entries, copy, tmp_path):
    private = tmp_path / "private" / "tokenizer"
    os.mkfifo(private / "pipe")
    folder = copy / "tokenizer"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert read_tokenizer(copy)
    text = json.dumps(entries).replace("{private}", str(private))
    (folder / file).touch()
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text() or "{}") | json.loads(text)))
    with pytest.raises(UserError, match=f"{folder / file}: its {next(iter(entries))} is"):
        read_tokenizer(copy)


def test_entries_of_published_tokenizers_are_read(copy):
    change(copy / "tokenizer" / "tokenizer_config.json", special_tokens_map_file="/root/.cache/map.json", tokenizer_file=None,
           vocab_file=None, init_inputs=[], name_or_path="openai/clip")  # fmt: skip
    tokens = {"bos_token": {"content": "<|startoftext|>"}, "pad_token": "<|endoftext|>", "additional_special_tokens": []}
    (copy / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert read_tokenizer(copy)


@pytest.mark.parametrize("file", ["model_index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
                                  "scheduler/scheduler_config.json", "vae/config.json", "unet/config.json"])  # fmt: skip
def test_files_that_lead_out_of_the_folder_are_refused(file, copy, tmp_path):
    (copy / file).unlink()
    (copy / file).symlink_to(tmp_path / "private" / file)
    with pytest.raises(UserError, match=f"{copy / file}: a link that leads out of the model's folder"):
        check_pipeline(copy, StableDiffusionPipeline)


@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_folders_of_parts_without_weights_are_no_links(part, copy, tmp_path):
    shutil.rmtree(copy / part)
    (copy / part).symlink_to(tmp_path / "private" / part)
    with pytest.raises(UserError, match="a link that leads out of the model's folder"):
        read_tokenizer(copy) if part == "tokenizer" else read_scheduler(copy)


@pytest.mark.parametrize("shared", ["vae", "vae/diffusion_pytorch_model.safetensors"])
def test_models_are_shared_by_links_and_it_is_said(shared, copy, tmp_path, capsys):
    digest = digest_folder(copy / "vae")
    shutil.rmtree(copy / shared) if (copy / shared).is_dir() else (copy / shared).unlink()
    (copy / shared).symlink_to(tmp_path / "private" / shared)
    check_pipeline(copy, StableDiffusionPipeline)
    assert f"{copy / shared}: a link, so its weights are taken from {tmp_path / 'private' / shared}" in capsys.readouterr().err
    assert digest_folder(copy / "vae") == digest
    load_pipeline(copy, StableDiffusionPipeline)


def test_a_shared_folder_leads_nowhere_else_either(copy, tmp_path):
    private = tmp_path / "private" / "vae"
    digest = digest_folder(private)
    (tmp_path / "secret").write_text("{}")
    (private / "notes.txt").symlink_to(tmp_path / "secret")
    shutil.rmtree(copy / "vae")
    (copy / "vae").symlink_to(private)
    check_weights(copy / "vae", AutoencoderKL)  # what nothing reads may lead anywhere
    assert digest_folder(copy / "vae") == digest
    (private / "config.json").rename(tmp_path / "config.json")
    (private / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config.json: a link that leads out of the model's folder"):
        check_weights(copy / "vae", AutoencoderKL)


def test_snapshots_of_the_hub_are_links_to_its_blobs(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in Path(model).rglob("*") if path.is_file())):
        shutil.copyfile(file, blobs / str(number))
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    check_pipeline(snapshot, StableDiffusionPipeline)
    (tmp_path / "mine").mkdir()
    for path in snapshot.iterdir():
        shutil.copytree(path, tmp_path / "mine" / path.name) if path.name != "vae" and path.is_dir() else None
    shutil.copyfile(snapshot / "model_index.json", tmp_path / "mine" / "model_index.json")
    (tmp_path / "mine" / "vae").symlink_to(snapshot / "vae")
    check_pipeline(tmp_path / "mine", StableDiffusionPipeline)


def test_what_no_part_holds_is_not_digested(copy):
    with (copy / "vae" / "more.bin").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(UserError, match="vae: holds 8192 GiB"):
        digest_folder(copy / "vae")


def test_an_index_of_weights_lies_in_the_folder_and_its_pieces_may_be_shared(copy, tmp_path):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    names = dict.fromkeys(load_file(weights), "piece.safetensors")
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    weights.rename(tmp_path / "piece.safetensors")
    weights.with_name("piece.safetensors").symlink_to(tmp_path / "piece.safetensors")
    check_pipeline(copy, StableDiffusionPipeline)
    index.rename(tmp_path / "index.json")
    index.symlink_to(tmp_path / "index.json")
    with pytest.raises(UserError, match=f"{index}: a link that leads out of the model's folder"):
        check_pipeline(copy, StableDiffusionPipeline)
