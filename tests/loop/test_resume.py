"""The output directory: an earlier run's results stay unless it is said what becomes of them; what a resume changes is said."""

import json
import shutil
from pathlib import Path

import pytest

from engine.config.checks import check_options
from engine.config.options import ALTER_THE_RESULT, TrainConfig
from engine.errors import UserError
from engine.failed import FAILED, begin, mark_as_taken
from engine.files import digest, write_json
from engine.launcher import launch
from engine.loop import trainer
from engine.loop.checkpoints.layout import complete_checkpoints, open_checked
from engine.loop.resume import find_checkpoint, remove_run
from engine.loop.trainer import train
from tests.loop.runs import config, flip_last_byte


@pytest.fixture(scope="module")
def finished(model, images, shards, tmp_path_factory):
    """A run of eight steps along a cosine, with what a run leaves."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    options = {"checkpointing_steps": 2, "validation_prompts": ["a red square"], "report_to": "tensorboard"}
    assert train(config(model, images, shards, output, **SCHEDULE | options)) == 0
    return output


SCHEDULE = {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "use_ema": False}


@pytest.fixture
def output(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def run(model, images, shards, output):
    plain = config(model, images, shards, output, max_train_steps=2, **SCHEDULE)
    return lambda **options: train(plain.model_copy(update=options))


def content(directory: Path) -> dict[str, str]:
    """What is there but for the note of a mistake."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != FAILED]
    return {path.relative_to(directory).as_posix(): digest(path) for path in files}


def steps(output: Path) -> list[int]:
    return [step for step in range(20) if (output / f"checkpoint-{step}").exists()]


def logged(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("gone", "options", "named"),
    [
        ("", {}, r"4 checkpoints, the last checkpoint-8 and metrics.jsonl"),
        ("metrics.jsonl", {}, r"4 checkpoints, the last checkpoint-8"),
        ("checkpoint-*", {}, "metrics.jsonl"),
        ("checkpoint-*", {"resume_from_checkpoint": "latest"}, "metrics.jsonl"),
        ("", {"resume_from_checkpoint": "elsewhere/checkpoint-4"}, "4 checkpoints"),
    ],
)
def test_an_earlier_run_is_refused_and_nothing_is_touched(gone, options, named, output, run, tmp_path, monkeypatch):
    for path in output.glob(gone) if gone else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(output, tmp_path / "elsewhere")
    before = content(output)
    with pytest.raises(
        UserError, match=rf"an earlier run left {named}.* there; --resume_from_checkpoint latest .* --overwrite"
    ):
        run(**options)
    assert content(output) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(output, run, capsys):
    for path in (*output.glob("checkpoint-*"), output / "model_index.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(resume_from_checkpoint="latest") == 0
    assert "no checkpoint there; starting from the beginning, without the metrics.jsonl there" in capsys.readouterr().err
    assert logged(output) == [1, 2]


def test_overwrite_removes_what_the_run_left_and_nothing_else(output, run, capsys):
    theirs = ["mine.txt", "samples/mine.png", "logs/mine", "checkpoint-of-mine/x", "shards/index.json", "unet.py"]
    for name in theirs:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
    assert run(overwrite=True) == 0
    assert all((output / name).read_text() == "mine" for name in theirs)
    assert "removed what an earlier run left: 4 checkpoints, the last checkpoint-8" in capsys.readouterr().err
    assert steps(output) == [2]
    assert logged(output) == [1, 2]
    assert not (output / "samples" / "step-8.png").exists()
    assert not list((output / "logs").glob("events*"))
    assert "\noverwrite" not in (output / "config.toml").read_text()


@pytest.mark.parametrize("named", ["out", "."])
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_overwrite_removes_an_adapter_of_any_form_and_nothing_else(form, named, tmp_path, monkeypatch):
    output = tmp_path / "out"
    adapters = ["pytorch_lora_weights.safetensors", "out.safetensors", "adapter_config.json", "unet/adapter_model.safetensors"]
    theirs = ["out/mine.txt", "mine.txt", "text_encoder/mine.txt"]
    left = ["metrics.jsonl", "learned_embeds.safetensors", "text_encoder/adapter_config.json", *adapters]
    for name in (*left, *theirs):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
    monkeypatch.chdir(output if named == "." else tmp_path)
    remove_run(config(output, output, output, Path(named), lora_rank=2, save_format=form))
    assert sorted(content(output)) == sorted(theirs)
    assert not (output / "unet").exists()


def test_overwrite_never_removes_before_everything_is_known(output, run):
    before = content(output)
    with pytest.raises(UserError, match="were built otherwise"):
        run(overwrite=True, resolution=32)
    assert content(output) == before


def test_overwrite_does_not_remove_what_the_run_needs(output, run):
    with pytest.raises(UserError, match="--overwrite would remove .*checkpoint-4, which --resume_from_checkpoint names"):
        run(overwrite=True, resume_from_checkpoint="checkpoint-4")
    with pytest.raises(UserError, match="--overwrite would remove the pipeline of --pretrained_model_name_or_path"):
        run(overwrite=True, pretrained_model_name_or_path=str(output))
    with pytest.raises(UserError, match="--overwrite removes what --resume_from_checkpoint latest goes on with"):
        check_options(config(output, output, output, output, overwrite=True, resume_from_checkpoint="latest"))


def test_a_longer_run_in_the_directory_does_not_displace_what_an_earlier_step_goes_on_to(output, run, capsys):
    options = {"resume_from_checkpoint": "checkpoint-2", "max_train_steps": 5, "checkpointing_steps": 1}
    assert run(checkpoints_total_limit=2, **options) == 0
    assert steps(output) == [4, 5, 6, 8]
    assert "checkpoint-4, checkpoint-6, checkpoint-8 of later steps stay there" in capsys.readouterr().err
    assert (output / "latest").read_text() == "checkpoint-5\n"
    assert logged(output) == [1, 2, 3, 4, 5]


def test_latest_follows_the_run_and_not_the_highest_number(output, run, monkeypatch):
    monkeypatch.setattr("engine.loop.trainer.Training.run_steps", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(resume_from_checkpoint="checkpoint-4", max_train_steps=8)
    assert (output / "latest").read_text() == "checkpoint-4\n"


def test_a_longer_schedule_and_changed_options_are_said(output, run, capsys):
    assert run(resume_from_checkpoint="latest", max_train_steps=16, adam_beta2=0.99, snr_gamma=5.0) == 0
    said = capsys.readouterr().err
    assert (
        "Changed since checkpoint-8: --max_train_steps 16 (was 8), --adam_beta2 0.99 (was 0.999), --snr_gamma 5.0 (was None)\n"
    ) in said
    assert "The learning rate after step 8 is 0.0005; as checkpoint-8 was trained, 0\n" in said
    assert run(resume_from_checkpoint="latest", max_train_steps=16, adam_beta2=0.99, snr_gamma=5.0) == 0
    assert "Changed" not in capsys.readouterr().err


def test_other_weights_than_the_checkpoints_are_refused_and_nothing_is_touched(output, run):
    before = content(output)
    with pytest.raises(UserError, match="checkpoint-8: was written without --freeze, and other weights are trained now; leave"):
        run(resume_from_checkpoint="latest", freeze=["conv_in"])
    assert content(output) == before


def edit_state(checkpoint: Path, edit) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    edit(state)
    write_json(checkpoint / "state.json", state)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_json(checkpoint / "manifest.json", manifest | {"state.json": digest(checkpoint / "state.json")})


def test_options_that_an_older_checkpoint_does_not_know_were_at_their_defaults(output, run, capsys):
    def from_before(state) -> None:
        for name in ("shuffle", "shuffle_window", "loss_type", "huber_c", "noise_offset", "proportion_empty_prompts"):
            del state["options"][name]

    edit_state(output / "checkpoint-8", from_before)
    given = {"resume_from_checkpoint": "checkpoint-8", "max_train_steps": 9}
    assert run(loss_type="huber", proportion_empty_prompts=0.5, **given) == 0
    said = capsys.readouterr().err
    changed = ("--max_train_steps 9 (was 8)", "--loss_type huber (was l2)", "--proportion_empty_prompts 0.5 (was 0.0)")
    assert f"Changed since checkpoint-8: {', '.join(changed)}\n" in said


def test_a_checkpoint_without_options_is_read_as_before(output, run, capsys):
    edit_state(output / "checkpoint-8", lambda state: state.pop("options"))
    assert run(resume_from_checkpoint="latest", max_train_steps=9) == 0
    assert "Changed" not in capsys.readouterr().err
    assert complete_checkpoints(output)[-1].name == "checkpoint-9"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_ema": True}, "checkpoint-8: was written without --use_ema, so there is no moving average to go on with"),
        ({"optimizer": "adamw8bit", "use_8bit_adam": True}, "checkpoint-8: was written without --use_8bit_adam; leave it out"),
        ({"seed": 12}, "checkpoint-8: was written with seed 11, this run has 12"),
        ({"train_batch_size": 2}, "checkpoint-8: was written with global_batch 4, this run has 2"),
        ({"resolution": 32}, r"checkpoint-8: was trained on other shards \(--resolution 16, now 32\)"),
        ({"center_crop": True}, r"other shards \(--random_crops 4, now --center_crop\)"),
    ],
)
def test_what_a_checkpoint_cannot_give_is_known_before_anything_is_encoded(options, said, output, run, tmp_path):
    with pytest.raises(UserError, match=said):
        run(resume_from_checkpoint="latest", shards_dir=str(tmp_path / "new"), **options)
    assert not (tmp_path / "new").exists()


def test_an_average_that_ends_is_said(model, images, shards, tmp_path, capsys):
    for options in ({"max_train_steps": 1}, {"max_train_steps": 2, "use_ema": False, "resume_from_checkpoint": "latest"}):
        assert train(config(model, images, shards, tmp_path / "out", **options)) == 0
    assert "The moving average of checkpoint-1 ends here: --use_ema is not given" in capsys.readouterr().err


def test_every_option_of_optimizer_and_objective_is_compared_or_known_not_to_matter():
    groups = {name: field.json_schema_extra["group"] for name, field in TrainConfig.model_fields.items()}
    known = {
        "use_ema",
        "use_8bit_adam",
        "max_skipped_steps",
        "gradient_noise_scale",
        "offload_ema",
        "foreach_ema",
        "set_grads_to_none",
        "offset_noise",
    }
    shaping = {name for name, group in groups.items() if group in ("optimizer", "objective")}
    assert shaping - known <= set(ALTER_THE_RESULT) <= groups.keys()


def test_a_checkpoint_that_was_moved_away_and_linked_is_gone_on_from(model, images, shards, tmp_path):
    output = tmp_path / "out"
    assert train(config(model, images, shards, output, max_train_steps=2)) == 0
    (tmp_path / "disk").mkdir()
    (output / "checkpoint-2").rename(tmp_path / "disk" / "checkpoint-2")
    (output / "checkpoint-2").symlink_to(tmp_path / "disk" / "checkpoint-2")
    options = {"max_train_steps": 4, "resume_from_checkpoint": "latest", "checkpoints_total_limit": 1}
    assert train(config(model, images, shards, output, **options)) == 0
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (tmp_path / "disk" / "checkpoint-2" / "state.json").is_file(), "only the link goes with the rotation"


def test_overwrite_spares_the_model_that_is_trained_and_other_peoples_logs(model, images, shards, tmp_path):
    output = tmp_path / "out"
    assert train(config(model, images, shards, output, max_train_steps=1)) == 0
    with pytest.raises(UserError, match="--overwrite would remove the pipeline of --pretrained_model_name_or_path"):
        train(config(output, images, shards, output, max_train_steps=1, overwrite=True))
    shared = tmp_path / "logs"
    shared.mkdir()
    (shared / "events.out.tfevents.1.other").touch()
    index = json.loads((output / "model_index.json").read_text())
    (output / "model_index.json").write_text(json.dumps(index | {"..": ["diffusers", "X"], "": ["diffusers", "X"]}))
    assert train(config(model, images, shards, output, max_train_steps=1, overwrite=True, logging_dir=str(shared))) == 0
    assert (shared / "events.out.tfevents.1.other").is_file()
    assert (output / "model_index.json").is_file()


def attempt(monkeypatch, number: int, launch: str = "one") -> None:
    """The environment of an attempt of torchrun."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/logs/{launch}/attempt_{number}/0/error.json")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "an earlier run left 4 checkpoints"),
        ({"resume_from_checkpoint": "checkpoint-4"}, "checkpoint-4"),
        ({"resume_from_checkpoint": "elsewhere/checkpoint-9"}, "an earlier run left 4 checkpoints"),
        ({"overwrite": True}, None),
    ],
)
def test_what_a_launcher_starts_again_before_it_took_the_directory_over_is_as_the_first(
    options, expected, output, model, images, shards, monkeypatch
):
    monkeypatch.chdir(output.parent)
    Path("elsewhere/checkpoint-9").mkdir(parents=True)
    run = config(model, images, shards, output, **options)
    attempt(monkeypatch, 0, "another")
    assert not begin(output, {launch()})
    mark_as_taken(output, {launch()})
    for number in (0, 1, 2):
        attempt(monkeypatch, number)
        again = begin(output, {launch(), "of another node"})
        if expected and expected.startswith("an"):
            with pytest.raises(UserError, match=expected):
                find_checkpoint(run, again)
        else:
            assert find_checkpoint(run, again) == (output / expected if expected else None)
    mark_as_taken(output, {launch()})
    assert begin(output, {launch(), "of a third node"})
    assert find_checkpoint(run, again=True) == output / "checkpoint-8"


def test_what_a_launcher_starts_again_goes_on(model, images, shards, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    run = config(model, images, shards, output, max_train_steps=4, overwrite=True)
    attempt(monkeypatch, 0)
    assert train(run.model_copy(update={"max_train_steps": 2})) == 0
    attempt(monkeypatch, 1)
    assert train(run) == 0
    assert "Continuing from" in capsys.readouterr().err
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]


def test_what_a_launcher_starts_again_goes_on_from_what_it_saved_and_not_from_where_it_began(output, run, monkeypatch, capsys):
    moved = output.rename(output.with_name("elsewhere")) / "checkpoint-2"
    begun = {"resume_from_checkpoint": str(moved), "checkpointing_steps": 1}
    attempt(monkeypatch, 0)
    with monkeypatch.context() as failing:
        failing.setattr("engine.loop.trainer.Training.run_steps", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(max_train_steps=3, **begun)
    (output / "metrics.jsonl").write_text('{"step": 2}\n')
    attempt(monkeypatch, 1)
    assert run(max_train_steps=3, **begun) == 0, "an attempt that saved nothing is no reason to refuse"
    assert f"Continuing from {moved}" in capsys.readouterr().err
    assert run(max_train_steps=4, **begun) == 0
    assert f"Continuing from {output / 'checkpoint-3'}" in capsys.readouterr().err


def test_where_the_latest_is_damaged_the_run_goes_on_from_the_newest_that_is_whole(output, run, capsys):
    weights = digest(output / "unet" / "diffusion_pytorch_model.safetensors")
    for step, name in ((8, "rank-0.safetensors"), (6, "state.json")):
        flip_last_byte(output / f"checkpoint-{step}" / name)
    with pytest.raises(UserError, match=r"checkpoint-8: damaged: .*; resume from .*checkpoint-4 instead"):
        run(resume_from_checkpoint="checkpoint-8", max_train_steps=8)
    assert run(resume_from_checkpoint="latest", max_train_steps=8, checkpointing_steps=2) == 0
    said = capsys.readouterr().err
    damaged = f"warning: {output / 'checkpoint-8'}: damaged: rank-0.safetensors missing or altered"
    assert f"{damaged}; going on from checkpoint-4, the newest other that is whole\n" in said
    assert f"Continuing from {output / 'checkpoint-4'}" in said
    assert digest(output / "unet" / "diffusion_pytorch_model.safetensors") == weights
    assert open_checked(output / "checkpoint-8").state.step == 8, "written again"


def test_a_run_that_left_no_checkpoint_is_not_said_to_go_on(model, images, shards, tmp_path):
    output = tmp_path / "out"
    assert train(config(model, images, shards, output, max_train_steps=1)) == 0
    shutil.rmtree(output / "checkpoint-1")
    with pytest.raises(
        UserError, match="--resume_from_checkpoint latest finds no checkpoint of it, --overwrite removes what it left"
    ):
        train(config(model, images, shards, output, max_train_steps=2, resume_from_checkpoint="latest"))


def test_a_checkpoint_needs_none_of_its_models(model, images, shards, tmp_path, monkeypatch, capsys):
    def full(checkpoint, **unused):
        (checkpoint / "unet").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "write_models", full)
    assert train(config(model, images, shards, tmp_path / "out", max_train_steps=2)) == 0
    assert "without models for diffusers to open" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()} == {
        "manifest.json", "rank-0.safetensors", "state.json",
    }  # fmt: skip


def test_an_order_by_locality_goes_on_in_the_middle_of_an_epoch(model, images, shards, tmp_path):
    def run(output: str, **options) -> int:
        return train(config(model, images, shards, tmp_path / output, max_train_steps=3, **options, **SCHEDULE))

    assert run("whole", shuffle="blocks", shuffle_window=2, checkpointing_steps=1) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "rest" / "checkpoint-1")
    said = "was written with --shuffle blocks --shuffle_window 2; leave both out, or give the same"
    with pytest.raises(UserError, match=said):
        run("rest", resume_from_checkpoint="latest", shuffle="blocks", shuffle_window=3)
    with pytest.raises(UserError, match=said):
        run("rest", resume_from_checkpoint="latest", shuffle_window=3)
    with pytest.raises(UserError, match="--shuffle_window needs --shuffle blocks"):
        run("none", resume_from_checkpoint="latest", shuffle_window=3)
    assert run("rest", resume_from_checkpoint="latest") == 0
    file = "checkpoint-3/unet/diffusion_pytorch_model.safetensors"
    assert digest(tmp_path / "whole" / file) == digest(tmp_path / "rest" / file)


def test_a_run_goes_on_in_the_order_that_it_was_begun_in(run):
    with pytest.raises(UserError, match="was written with --shuffle global; leave both out, or give the same"):
        run(resume_from_checkpoint="latest", shuffle="blocks")
