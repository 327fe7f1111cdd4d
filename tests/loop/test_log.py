"""Trackers are tried before anything is encoded, and a resumed run goes on with its run of Weights & Biases."""

import datetime
import json
import os
import sys

import pytest
import torch.utils.tensorboard

from engine.config import checks
from engine.errors import UserError
from engine.loop import export
from engine.loop import log as log_module
from engine.loop.log import Log, check_trackers
from engine.loop.trainer import train
from tests.loop.runs import config

WANDB = """
__version__ = VERSION
calls = []
class Run:
    def log(self, values, step):
        calls.append(("log", step, values))
    def finish(self, exit_code):
        calls.append(("finish", exit_code))
def login(**options):
    LOGIN
def init(**options):
    INIT
    calls.append(("init", options))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Puts a package in the place of wandb."""

    def install(version: str = "0.31.0", login: str = "return True", init: str = "pass", code: str = WANDB) -> None:
        (tmp_path / "site" / "wandb").mkdir(parents=True)
        code = code.replace("VERSION", repr(version)).replace("LOGIN", login).replace("INIT", init)
        (tmp_path / "site" / "wandb" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "site")

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield install
    sys.modules.pop("wandb", None)


def run(tmp_path, **options):
    return config(tmp_path, tmp_path, tmp_path, tmp_path / "out", **options)


BROKEN = {
    "without a key": (
        {"login": "raise RuntimeError('No API key configured.')"},
        "No API key configured; `wandb login`.*WANDB_MODE",
    ),
    "without a network": ({"login": "raise OSError('timed out\\nafter 30 s')"}, "timed out; .*WANDB_MODE=offline"),
    "old": ({"version": "0.12.21"}, "wandb 0.12.21 is too old: install the extra `wandb` again"),
    "unfitting": ({"code": "raise TypeError('Descriptors cannot be created')"}, "cannot be imported .Descriptors cannot"),
}


@pytest.mark.parametrize(("broken", "said"), BROKEN.values(), ids=BROKEN)
def test_a_tracker_that_cannot_be_used_is_refused_or_left_out_in_a_line(broken, said, wandb, tmp_path, capsys):
    wandb(**broken)
    with pytest.raises(UserError, match=f"^--report_to wandb: .*{said}") as error:
        check_trackers(run(tmp_path, report_to="wandb"))
    assert "\n" not in str(error.value)
    log_module.warn.__globals__["_warned"].clear()
    assert check_trackers(run(tmp_path, report_to="all")).report_to == "tensorboard"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --report_to all: ")


def test_trackers_are_tried_before_anything_is_encoded(model, images, wandb, tmp_path):
    wandb(login="raise RuntimeError('No API key configured.')")
    with pytest.raises(UserError, match="No API key configured"):
        train(config(model, images, tmp_path / "shards", tmp_path / "out", report_to="wandb"))
    assert not (tmp_path / "shards").exists()


def test_a_folder_that_wandb_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not checks.installed("wandb")


def test_tensorboard_that_does_not_import_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard")
    with pytest.raises(UserError, match="--report_to tensorboard: .*install tensorboard"):
        check_trackers(run(tmp_path, report_to="tensorboard"))


def test_a_resumed_run_goes_on_with_its_run(model, images, shards, wandb, tmp_path):
    wandb()
    out = tmp_path / "out"
    options = {"report_to": "wandb", "checkpointing_steps": 2}
    assert train(config(model, images, shards, out, max_train_steps=2, **options)) == 0
    assert train(config(model, images, shards, out, max_train_steps=4, resume_from_checkpoint="latest", **options)) == 0
    assert train(config(model, images, shards, out, max_train_steps=2, overwrite=True, tracker_run_name="x", **options)) == 0
    calls = sys.modules["wandb"].calls
    first, resumed, anew = (options for kind, options in (call[:2] for call in calls) if kind == "init")
    assert first["id"] == resumed["id"] != anew["id"]
    assert (first["name"], resumed["name"], anew["name"]) == ("out", None, "x")
    assert [call[1] for call in calls if call[0] == "log"] == [1, 2, 3, 4, 1, 2]
    assert [call[1] for call in calls if call[0] == "finish"] == [0, 0, 0]


def test_a_run_that_fails_is_told_to_its_tracker(wandb, tmp_path):
    wandb()
    (tmp_path / "out").mkdir()

    def fail(log: Log) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            log.close()

    with pytest.raises(KeyboardInterrupt):
        fail(Log(run(tmp_path, report_to="wandb"), 0))
    assert sys.modules["wandb"].calls[-1] == ("finish", 1)


def test_a_tracker_that_fails_to_open_is_one_line_and_one_that_fails_later_a_warning(wandb, tmp_path, capsys):
    wandb(init="if 'x' == options['name']: raise RuntimeError('no such project\\nmore')")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="^--report_to wandb: no such project; WANDB_MODE=offline keeps"):
        Log(run(tmp_path, report_to="wandb", tracker_run_name="x"), 0)
    log = Log(run(tmp_path, report_to="wandb"), 0)
    log.wandb = object()  # which has no `log`
    log.write({"step": 1, "loss": 2.0})
    assert "warning: the tracker: " in capsys.readouterr().err
    log.file.close()
    [line] = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    written = datetime.datetime.fromisoformat(line.pop("time"))
    assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(minutes=5)
    assert line == {"step": 1, "loss": 2.0}


SECRET = "hf_verySecretToken"


def test_a_token_reaches_no_file_and_no_line_and_nothing_is_for_others_to_write(
    model, images, shards, wandb, tmp_path, monkeypatch, capfd
):
    class Api:
        def __init__(self, token):
            assert token == SECRET

        def create_repo(self, name, exist_ok):
            return type("Repository", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, **options):
            pass

    wandb()
    monkeypatch.setattr(export, "HfApi", Api)
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    options = {
        "hub_token": SECRET, "push_to_hub": True, "report_to": "all", "checkpointing_steps": 1, "max_train_steps": 2,
        "checkpoint_async": True, "validation_prompts": ["a red square"],
    }  # fmt: skip
    before = os.umask(0o022)
    try:
        assert train(config(model, images, tmp_path / "out" / "shards", tmp_path / "out", **options)) == 0
    finally:
        os.umask(before)
    said = "".join(capfd.readouterr())
    assert "Trained 2 steps" in said
    assert SECRET not in said
    assert SECRET not in repr(sys.modules["wandb"].calls)
    written = list((tmp_path / "out").rglob("*"))
    assert {"README.md", "config.toml", "state.json", "index.json", "metrics.jsonl"} <= {path.name for path in written}
    assert list((tmp_path / "out" / "logs").glob("events*"))
    assert not [path for path in written if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not [path for path in written if path.stat().st_mode & 0o022]
    assert not [path for path in written if path.is_file() and not path.stat().st_mode & 0o044], "the umask, and no less"


def test_what_fails_at_the_end_does_not_replace_the_error_of_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    log = Log(run(tmp_path, report_to="tensorboard"), 0)
    log.write({"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 1.0, "samples_per_second": 1.0})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    class Full:
        write = flush = close = full

    log.file.close()
    log.file = Full()
    monkeypatch.setattr(log_module, "curves", full)
    monkeypatch.setattr(log.tensorboard, "close", full)

    def fail() -> None:
        try:
            log.write({"step": 2, "loss": 2.0})
            raise UserError("the last complete one is checkpoint-3")
        finally:
            log.close()

    with pytest.raises(UserError, match="the last complete one is checkpoint-3"):
        fail()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert [line.split(": ")[1].rpartition("/")[2] for line in warnings] == [
        "metrics.jsonl", "metrics.jsonl", "curves.png", "TensorBoard",
    ]  # fmt: skip


def test_metrics_that_are_none_are_passed_over_and_a_pipe_is_refused(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n[]\n"x"\n{"step": "x"}\n{"step": 3}\n' + "[" * 100_000 + "\n{}\n")
    log_module._forget_after(metrics, 2, 2)
    assert metrics.read_text() == '{"step": 1}\n'
    metrics.unlink()
    os.mkfifo(metrics)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read: not a regular file; move it away"):
        log_module._forget_after(metrics, 2, 2)


def test_a_token_that_cannot_be_sent_is_not_quoted(model, images, tmp_path, monkeypatch):
    def refuse(token):
        raise ValueError(f"Illegal header value b'Bearer {token}'")

    monkeypatch.setattr(export, "HfApi", refuse)
    with pytest.raises(UserError, match=r"--push_to_hub: cannot create out: Illegal header value b'Bearer \.\.\.'; log in"):
        train(config(model, images, tmp_path / "shards", tmp_path / "out", push_to_hub=True, hub_token=SECRET))
