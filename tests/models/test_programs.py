"""Nothing of a model's folder is run: neither Python files that its configurations name, nor what its pickles hold."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from engine.catalogue import DECODER, FAMILIES, MODEL, PRIOR
from engine.errors import UserError
from engine.models import published as models_published
from engine.models.efficientnet import read_weights
from engine.models.single_file import open_single_file
from tests.in_process import run
from tests.models.test_check import RESOLUTION, change, list_safety_checker
from tests.models.test_single_file import configuration

PROGRAM = """
from pathlib import Path
Path({marker!r}).touch()
class Evil:
    @classmethod
    def from_pretrained(cls, *arguments, **options):
        return cls()
"""
# How a folder names a program of its own -> the file, the entry, and what it says.
WAYS = {
    "component": ("model_index.json", "{part}", ["evil", "Evil"]),
    "dotted": ("model_index.json", "{part}", ["evil.evil", "Evil"]),
    "pipeline": ("model_index.json", "_class_name", ["evil", "Evil"]),
    "custom": ("model_index.json", "_class_name", "Evil"),
    "stranger": ("model_index.json", "more", ["evil", "Evil"]),
    "other library": ("model_index.json", "{part}", ["os", "Evil"]),
    "scheduler": ("model_index.json", "scheduler", ["evil", "Evil"]),
    "class of a part": ("{part}/config.json", "_class_name", ["evil", "Evil"]),
    "auto_map": ("{part}/config.json", "auto_map", {"AutoModel": "evil.Evil"}),
    "nested auto_map": ("{part}/config.json", "text_config", {"more": [{"auto_map": {"AutoModel": "evil.Evil"}}]}),
    "class of a scheduler": ("scheduler/scheduler_config.json", "_class_name", "Evil"),
}
OF_TEXT = {
    "tokenizer": ("model_index.json", "tokenizer", ["evil", "Evil"]),
    "auto_map of a tokenizer": ("tokenizer/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Evil", None]}),
    "class of a tokenizer": ("tokenizer/tokenizer_config.json", "tokenizer_class", "Evil"),
    "kernels": ("text_encoder/config.json", "_attn_implementation", "evil/Evil"),
    "auto_map of text": ("text_encoder/config.json", "auto_map", {"AutoModel": "evil.Evil"}),
}
CASES = [(family, way) for family in FAMILIES for way in WAYS | (OF_TEXT if family != "kandinsky-decoder" else {})]


@pytest.fixture
def planted(published, tmp_path):
    """(family, way, option) -> the options of its models, with programs in a copy of the one that the option names."""

    def plant(family: str, way: str, option: str | None = None) -> tuple[dict[str, str], Path]:
        option = option or FAMILIES[family].pipeline
        folder = tmp_path / "planted"
        shutil.copytree(published(family)[option], folder)
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            for name in ("evil.py", "pipeline.py", "None.py", "os.py"):
                (place / name).write_text(PROGRAM.format(marker=str(tmp_path / "marker")))
        part = FAMILIES[family].part if option == FAMILIES[family].pipeline else "unet"
        file, entry, value = (WAYS | OF_TEXT)[way] if way else ("model_index.json", "_more", "nothing")
        change(folder / file.format(part=part), **{entry.format(part=part): value})
        return published(family) | {option: str(folder)}, folder

    return plant


def command(module: str, *arguments: object, **options: object) -> list[str]:
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", module, *map(str, arguments), *given]


def refused(words: list[str], directory: Path, named: str = "Evil") -> None:
    ended = run(words)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert named in line
    assert not (directory / "marker").exists()


@pytest.mark.parametrize(("family", "way"), CASES)
def test_no_program_of_a_folder_is_run_when_a_run_opens_it(family, way, planted, images, tmp_path):
    models, _ = planted(family, way)
    options = {"resolution": RESOLUTION[family], "train_data_dir": images, "output_dir": tmp_path / "out", "max_train_steps": 1}
    refused(command("engine.run", family=family, **models, **options), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "way"), [(family, way) for family, way in CASES if way in ("component", "pipeline")])
def test_nor_when_it_is_drawn_with_or_exported(family, way, planted, published, tmp_path):
    _, folder = planted(family, way)
    refused(command("engine.export", model=folder, single_file=tmp_path / "out.safetensors"), tmp_path)
    refused(command("engine.sample", model=folder, prompts="a"), tmp_path)
    other = {PRIOR: DECODER, DECODER: PRIOR}.get(FAMILIES[family].pipeline)
    if other:
        refused(command("engine.sample", model=published(family)[other], prompts="a", other_half=folder), tmp_path)


@pytest.mark.parametrize("way", ["component", "pipeline", "tokenizer", "scheduler"])
def test_nor_when_shards_and_checkpoints_are_opened(way, planted, images, shards, model, tmp_path):
    models, folder = planted("sd", way)
    source = {"train_data_dir": images, "resolution": 16}
    refused(command("engine.shards", "build", family="sd", **models, **source, shards_dir=tmp_path / "shards"), tmp_path)
    trained = {"family": "sd", MODEL: model, "shards_dir": shards, "output_dir": tmp_path / "out", "resolution": 16}
    (tmp_path / "link").symlink_to(model)
    ended = run(command("engine.run", *["--random_flip"], **trained | {MODEL: tmp_path / "link"}, max_train_steps=1))
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(folder)
    refused(command("engine.checkpoint", "export", tmp_path / "out", output_dir=tmp_path / "exported"), tmp_path)


def test_files_that_nothing_names_are_not_run_either(planted, tmp_path):
    """diffusers would run None.py."""
    _, folder = planted("sd", "")
    ended = run(command("engine.sample", model=folder, prompts="a", resolution=16, num_inference_steps=1,
                        output=tmp_path / "samples.png"))  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "marker").exists()


def test_the_index_of_a_name_on_the_hub_is_judged_before_anything_else_is_fetched(planted, tmp_path, monkeypatch):
    _, folder = planted("sd", "pipeline")
    monkeypatch.setattr(models_published, "hf_hub_download", lambda *arguments, **options: str(folder / "model_index.json"))
    monkeypatch.setattr(models_published.DiffusionPipeline, "download", lambda *arguments, **options: pytest.fail("fetched"))
    with pytest.raises(UserError, match="Evil"):
        models_published.download("somebody/something")


def test_what_old_releases_and_published_models_write_is_read(model, tmp_path):
    shutil.copytree(model, tmp_path / "old")
    list_safety_checker(tmp_path / "old")
    change(tmp_path / "old" / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"], image_encoder=[None, None],
           _name_or_path="CompVis/x", _ignore_files=["a", "b", "c"], scheduler=["diffusers", "DDIMScheduler"])  # fmt: skip
    change(tmp_path / "old" / "tokenizer" / "tokenizer_config.json", name_or_path="openai/clip", tokenizer_class=None,
           special_tokens_map_file="./special_tokens_map.json")  # fmt: skip
    change(tmp_path / "old" / "text_encoder" / "config.json", torch_dtype="float32", dropout=0.0, _name_or_path="openai/clip")
    ended = run(command("engine.sample", model=tmp_path / "old", prompts="a", resolution=16, num_inference_steps=2,
                        output=tmp_path / "samples.png"))  # fmt: skip
    assert ended.returncode == 0, ended.stderr


class Program:
    """In a pickle, what makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return exec, (PROGRAM.format(marker=str(self.marker)),)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_parts_run_nothing(part, legacy, model, images, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    for file in (tmp_path / "copy" / part).glob("*.safetensors"):
        file.unlink()
    file = tmp_path / "copy" / part / ("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin")
    torch.save({"a": Program(tmp_path / "marker")}, file, _use_new_zipfile_serialization=not legacy)
    options = {"train_data_dir": images, "output_dir": tmp_path / "out", "resolution": 16, "max_train_steps": 1}
    refused(command("engine.run", family="sd", **{MODEL: tmp_path / "copy"}, **options), tmp_path, f"{file}: holds programs")
    refused(command("engine.sample", model=tmp_path / "copy", prompts="a"), tmp_path, f"{file}: holds programs")


def test_other_pickles_run_nothing(model, tmp_path):
    marker = tmp_path / "marker"
    torch.save({"state_dict": Program(marker)}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="holds programs beside tensors, and is not run"):
        open_single_file(tmp_path / "model.ckpt", configuration(tmp_path / "model.ckpt", model, tmp_path))
    torch.save({"effnet_state_dict": Program(marker)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds programs beside tensors, and is not run"):
        read_weights(str(tmp_path / "model.pt"), None)
    assert not marker.exists()


NO_PARTS = [
    ("../vae", ["diffusers", "AutoencoderKL"]), ("v" * 300, ["diffusers", "VQModel"]), ("vae", ["diffusers"]), ("vae", [1, 2]),
    ("vae", [[], {}]), ("vae", ["diffusers", "utils"]), ("vae", ["diffusers", "__name__"]), ("_class_name", None),
    ("vae", ["diffusers", "UNet2DConditionModel"]), ("unet", ["diffusers", "DDPMScheduler"]), ("_class_name", "os"),
    ("_class_name", "FluxPipeline"),
]  # fmt: skip


def test_indexes_hold_nothing_but_parts(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    file = tmp_path / "copy" / "model_index.json"
    whole = json.loads(file.read_text())
    for part, value in NO_PARTS:
        file.write_text(json.dumps(whole | {part: value}))
        refused(command("engine.sample", model=tmp_path / "copy", prompts="a"), tmp_path, "copy")
