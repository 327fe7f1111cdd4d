"""The note of a run that the same command would not mend."""

import sys

import pytest

from engine.errors import UserError
from engine.files import lock, unlock
from engine.loop.trainer import train
from tests.commands import run, start_two
from tests.loop.runs import command, config


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


def test_a_mistake_is_noted_and_a_good_start_removes_the_note(model, images, shards, output):
    good = config(model, images, shards, output, max_train_steps=1)
    with pytest.raises(UserError) as error:
        train(good.model_copy(update={"pretrained_model_name_or_path": str(output / "none")}))
    assert (output / "failed").read_text() == f"{error.value}\n"
    held = lock(output)
    with pytest.raises(UserError, match="another run is writing there"):
        train(good)
    assert "none" in (output / "failed").read_text(), "what another run's directory says is left alone"
    unlock(held, output)
    assert train(good) == 0
    assert not (output / "failed").exists()


def test_what_another_attempt_may_not_meet_is_not_noted(model, images, shards, output, monkeypatch):
    def failing(config):
        raise UserError("this disk", passing=True)

    monkeypatch.setattr("engine.loop.trainer.open_family", failing)
    with pytest.raises(UserError):
        train(config(model, images, shards, output))
    assert not (output / "failed").exists()


@pytest.mark.parametrize("how", ["two words", "one word", "recipe"])
def test_a_mistake_on_the_command_line_is_noted_under_a_launcher(how, output, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)  # which DeepSpeed is given in the process of the tests
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"output_dir = '{output}'\nunknown = 1\n")
    named = {"two words": ["--output_dir", output], "one word": [f"--output_dir={output}"], "recipe": ["--config", recipe]}
    arguments = [sys.executable, "-m", "engine.run", *map(str, named[how]), "--nonsense"]
    assert run(arguments).returncode == 2
    assert not (output / "failed").exists()
    result = run(arguments, RANK="0")
    assert result.returncode == 2
    noted = (output / "failed").read_text().splitlines()
    assert [f"engine.run: error: {line}" for line in noted] == result.errors.splitlines()


def test_an_attempt_that_is_started_again_heeds_the_note(model, images, shards, output, monkeypatch):
    run = config(model, images, shards, output, max_train_steps=1)
    for launch in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/logs/{launch}/attempt_0/0/error.json")
        with pytest.raises(UserError, match="none: "):
            train(run.model_copy(update={"pretrained_model_name_or_path": str(output / "none")}))
        (output / "failed").write_text("--this is wrong\nreached step 3\n")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/logs/{launch}/attempt_1/0/error.json")
        with pytest.raises(UserError, match="^--this is wrong\nreached step 3$"):
            train(run)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/3/attempt_1/0/error.json")
    assert train(run) == 0, "whose first attempt ended before it came here"


ALONE = """
import sys
from engine.errors import UserError
from engine.loop import trainer
from engine.processes import Processes
def failing(config, family, processes, *rest):
    if processes.rank == 1:
        raise UserError("this one only", alone=True)
    processes.wait_for_all()
trainer.prepare_shards = failing
from engine import run
from engine.errors import exit_code
sys.argv[0] = "engine.run"
sys.exit(exit_code("engine.run", run.main))
"""


@pytest.mark.two_processes
def test_a_process_that_meets_a_mistake_alone_notes_it(model, images, shards, output):
    options = command(config(model, images, shards, output, train_batch_size=2))
    both = start_two([sys.executable, "-c", ALONE, *options[3:]])
    assert [process.wait(60) for process in both] == [75, 2]
    assert both[1].errors == "engine.run: error: this one only\n"
    assert "process 0: process 1 left; " in both[0].errors
    assert (output / "failed").read_text() == "this one only\n"


PASSING = """
import errno, os, sys
from engine.errors import blame_the_machine, exit_code
from engine.launcher import rank
from engine.loop import resume, trainer
from engine.loop.checkpoints import writer
def failing(number, path="somewhere"):
    raise OSError(number, os.strerror(number), str(path))
def stale(config):
    try:
        failing(errno.ESTALE)
    except OSError as error:
        blame_the_machine(trainer.Path(config.pretrained_model_name_or_path), error)
if rank() == RANK:
    FAILS
from engine import run
sys.argv[0] = "engine.run"
sys.exit(exit_code("engine.run", run.main))
"""


@pytest.mark.two_processes
@pytest.mark.parametrize(
    ("rank", "fails", "said"),
    [
        (
            1,
            "writer.write_pieces = lambda path, *rest: failing(errno.ENOSPC, path)",
            "checkpoint-1 cannot be written: process 1: No",
        ),
        (1, "trainer.open_family = stale", "cannot be read: Stale file handle; mend"),
        (0, "trainer.check_trackers = lambda config: failing(errno.EDQUOT, 'cache')", "cache: Disk quota exceeded; mend"),
        (0, "resume.write_text = lambda path, text: failing(errno.ENOSPC, path)", "config.toml: No space left on device; mend"),
        (0, "trainer.Log = lambda config, *rest: failing(errno.EACCES, 'metrics')", "metrics: Permission denied; mend"),
    ],
    ids=["full", "stale", "trackers", "taking over", "log"],
)
def test_a_disk_that_fails_one_process_is_said_by_the_first_and_not_noted(rank, fails, said, model, images, shards, output):
    options = command(config(model, images, shards, output, train_batch_size=2, max_train_steps=1))
    both = start_two([sys.executable, "-c", PASSING.replace("FAILS", fails).replace("RANK", str(rank)), *options[3:]])
    assert [process.wait(60) for process in both] == [2, 2], [process.errors for process in both]
    assert said in both[0].errors
    assert not both[1].errors
    assert not (output / "failed").exists()
