"""What an export leaves where it is killed, and what of a model's folder it takes along and publishes."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.loop import export
from engine.loop.export import push_to_hub, save_pipeline
from engine.models.family import open_family
from engine.models.pipelines import open_pipeline
from engine.models.training_form import SHIPPED, to_published_form, to_training_form

MODEL = "pretrained_model_name_or_path"
SECRET = "hf_secret_of_another_directory"


def opened(model: Path) -> tuple:
    """A family, its module in training form and the tensors that are exported, for `save_pipeline`."""
    config = TrainConfig.model_validate({"family": "sd", MODEL: str(model), "resolution": 16, "shards_dir": "unused"})
    family = open_family(config)
    family.check_files()
    module = family.published_model()
    to_training_form(module, SHIPPED)
    return family, module, list(to_published_form(module, [*module.named_parameters(), *module.named_buffers()]))


def save(model: Path, output: Path) -> None:
    save_pipeline(output, *opened(model))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Killed(BaseException):
    pass


def test_a_second_export_leaves_no_old_index_beside_new_parts(model, tmp_path, monkeypatch):
    output, parts = tmp_path / "out", opened(model)
    save_pipeline(output, *parts)
    whole, left = contents(output), iter(())

    def until_killed(change):
        def changed(*arguments):
            if next(left, None) is None:
                raise Killed
            return change(*arguments)

        return changed

    monkeypatch.setattr(export.shutil, "move", until_killed(shutil.move))
    monkeypatch.setattr(export, "discard", until_killed(export.discard))
    for instant in range(50):
        left = iter(range(instant))
        try:
            save_pipeline(output, *parts)
        except Killed:
            there = {name: content for name, content in contents(output).items() if not name.startswith("pipeline.partial")}
            assert there == whole or "model_index.json" not in there
        else:
            break
    assert instant > 9
    assert contents(output) == whole


LINKED = ["added.txt", "notes.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
          "chat_template.jinja", "additional_chat_templates/a.jinja", "../scheduler/scheduler_config.json",
          "../unet/config.json", "../text_encoder/config.json", "../model_index.json", "folder"]  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_links_that_lead_elsewhere_bring_nothing_into_the_result(name, model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer" / name
    file.parent.mkdir(exist_ok=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if name == "folder":
        (elsewhere / "token").write_text(SECRET)
        file.symlink_to(elsewhere)
    else:
        before = file.read_text() if file.is_file() else "{}"
        secret = f"{SECRET} of it\n" if file.suffix in (".txt", ".jinja") else before.replace("{", f'{{"token": "{SECRET}",', 1)
        (elsewhere / "token").write_text(secret.replace(",}", "}"))
        file.unlink(missing_ok=True)
        file.symlink_to(elsewhere / "token")
    if name not in ("added.txt", "notes.json", "folder"):
        with pytest.raises(UserError, match="a link that leads out of the model's folder; put a copy of the file there"):
            save(tmp_path / "copy", tmp_path / "out")
        return
    save(tmp_path / "copy", tmp_path / "out")
    assert f"left out of the result: {name}" in capsys.readouterr().err
    assert not any(SECRET.encode() in content for content in contents(tmp_path / "out").values())
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_snapshot_of_the_hubs_cache_is_exported_with_what_its_links_lead_to(model, tmp_path):
    snapshot, blobs = (tmp_path / "models--a--b" / name for name in ("snapshots/4d7a", "blobs"))
    shutil.copytree(model, snapshot)
    blobs.mkdir()
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path(*[".."] * (len(file.relative_to(snapshot).parts) + 1), "blobs", str(number)))
    save(model, tmp_path / "expected")
    for source, output in ((snapshot, tmp_path / "out"), (tmp_path / "link", tmp_path / "linked")):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(snapshot)
        save(source, output)
        assert contents(output).keys() == contents(tmp_path / "expected").keys()
        assert contents(output / "tokenizer") == contents(tmp_path / "expected" / "tokenizer")
        open_pipeline(output, None, None)


def test_links_are_not_published(model, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "secret").write_text(SECRET)
    (output / "weights.bin").write_text("inside")
    (output / "README.md").symlink_to(tmp_path / "secret")
    for name in ("token.txt", "a[b]c", "inside"):
        (output / name).symlink_to(output / "weights.bin" if name == "inside" else tmp_path / "secret")
    (output / "folder").symlink_to(tmp_path)
    config = TrainConfig.model_validate(
        {"family": "sd", MODEL: str(model), "resolution": 16, "shards_dir": "unused", "output_dir": str(output),
         "max_train_steps": 1}
    )  # fmt: skip
    published = {}

    def upload(self, *, folder_path, ignore_patterns, **options):
        from huggingface_hub.utils import filter_repo_objects

        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).glob("**/*") if path.is_file()]
        files += [f"folder/{path.name}" for path in (output / "folder").iterdir() if path.is_file()]
        published.update({name: (output / name).read_text() for name in
                          filter_repo_objects(files, ignore_patterns=ignore_patterns)})  # fmt: skip

    monkeypatch.setattr(export.HfApi, "upload_folder", upload)
    push_to_hub(config, open_family(config), "a/b")
    assert published.keys() == {"README.md", "weights.bin", "inside"}
    assert SECRET not in "".join(published.values())
    assert (tmp_path / "secret").read_text() == SECRET
    assert "these links lead elsewhere: " in capsys.readouterr().err


CARDS = {
    ("sd", "diffusers"): 'pipeline.load_lora_weights("a/b", weight_name="pytorch_lora_weights.safetensors")',
    ("sd", "kohya"): 'pipeline.load_lora_weights("a/b", weight_name="out.safetensors")',
    ("wuerstchen", "diffusers"): 'pipeline.load_lora_weights("a/b", weight_name="pytorch_lora_weights.safetensors")',
    ("kandinsky-prior", "diffusers"): 'pipeline.prior.load_lora_adapter("a/b", prefix="prior", weight_name="pytorch_lora',
    ("kandinsky-decoder", "peft"): 'pipeline.unet = PeftModel.from_pretrained(pipeline.unet, "a/b")\n',
    ("wuerstchen", "kohya"): None,
}


@pytest.mark.parametrize(("family", "form"), CARDS)
def test_the_card_of_an_adapter_says_how_it_is_loaded(family, form, tmp_path, monkeypatch):
    config = TrainConfig.model_validate(
        {"family": family, MODEL: "someone/base", "shards_dir": "unused", "output_dir": str(tmp_path / "out"),
         "max_train_steps": 1, "lora_rank": 4, "save_format": form}
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(export.HfApi, "upload_folder", lambda self, **options: None)
    push_to_hub(config, SimpleNamespace(base_model="someone/base"), "a/b")
    card = (tmp_path / "out" / "README.md").read_text()
    code = CARDS[family, form]
    assert card.count("```") == (2 if code else 0)
    assert code is None or code in card
    assert {"base_model: someone/base", "library_name: diffusers", "- lora"} <= {*card.splitlines()}
    push_to_hub(config, SimpleNamespace(base_model=str(tmp_path)), "a/b")
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()
