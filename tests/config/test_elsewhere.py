"""What is said of options as other trainers name them, and the table of it in the README."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from engine.config.elsewhere import ELSEWHERE
from engine.config.options import TrainConfig
from engine.errors import UserError
from engine.shards import build_command
from tests.config.arguments import run

NAMES = [name for names in ELSEWHERE for name in names.split()]


def refusals(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as error:
        run(*arguments)
    return str(error.value).splitlines()


def table() -> str:
    rows = ["| elsewhere | here |", "|---|---|"]
    for names, here in ELSEWHERE.items():
        here = here if "`" in here else re.sub(r"--\w+", r"`\g<0>`", here)
        rows.append(f"| {' '.join(f'`{name}`' for name in names.split())} | {here} |")
    return "\n".join(rows)


def test_the_readme_shows_the_table():
    assert f"\n{table()}\n" in Path("README.md").read_text(encoding="utf-8")


def test_every_answer_names_options_that_there_are():
    named = {name for here in ELSEWHERE.values() for name in re.findall(r"--(\w+)", re.sub(r"`[^`]*`", "", here))}
    assert named <= TrainConfig.model_fields.keys() | {"config"}


def test_an_answer_that_is_a_sentence_does_not_begin_with_an_option():
    assert not [here for here in ELSEWHERE.values() if re.match(r"--\w+ (?!and |with )(?!\w+$)[a-z]+ ", here)]


def test_a_name_stands_once_and_is_none_of_ours():
    assert len(NAMES) == len(set(NAMES))
    assert not [(name, ours) for name in NAMES for ours in TrainConfig.model_fields if fnmatchcase(ours, name)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--network-dim", "8"], "unknown option --network-dim: here it is --lora_rank"),
        (["--network_alpha=1"], "unknown option --network_alpha: here it is --lora_alpha, which is the rank where"),
        (["--max_train_epochs", "3"], "unknown option --max_train_epochs: here it is --num_train_epochs"),
        (["--min_snr_gamma=5"], "unknown option --min_snr_gamma: here it is --snr_gamma"),
        (["--multi_gpu"], "unknown option --multi_gpu: here it is `torchrun"),
        (["--is_reg"], "unknown option --is_reg: here it is `loss_weight` in a [[data]] table"),
        (["--initial_epoch", "3"], "unknown option --initial_epoch: here it is --resume_from_checkpoint, which goes on"),
        (["--conditioning_data_dir", "m"], "unknown option --conditioning_data_dir: masks lie beside the images"),
        (["--huber_scale", "3"], "unknown option --huber_scale: the loss that --loss_type names has no factor"),
        (["--cache_latents_to_disk"], "unknown option --cache_latents_to_disk: not needed"),
        (["--train-batch-size", "4"], "unknown option --train-batch-size; did you mean --train_batch_size?"),
        (["-resolutoin", "4"], "unknown option -resolutoin; did you mean --resolution?"),
        (["--locl_rank", "0"], "unknown option --locl_rank; --help lists all options"),
    ],
    ids=str,
)
def test_a_name_of_another_trainer_is_answered(arguments, said, data):
    [line] = refusals(*data, *arguments)
    assert line.startswith(said)


def test_all_mistakes_are_told_at_once_a_line_each(data):
    lines = refusals(
        *data,
        "--network_dim",
        "32",
        "--network_args",
        "a=1",
        "b=-1",
        "--zzz",
        "-0.5",
        "--resolution",
        "512,512",
        "--seed=x",
        "--cache_dir=",
    )
    assert [line.split(":")[0].split(";")[0] for line in lines] == [
        "unknown option --network_dim", "unknown option --network_args", "unknown option --zzz", "--cache_dir is empty",
        "--resolution '512,512'", "--seed 'x'",
    ]  # fmt: skip


def test_all_mistakes_of_a_file_are_told_at_once(data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('epochs = 3\nzzz = 1\n[optimizer]\ntype = "adamw"\n[[directory]]\npath = "x"\n')
    assert refusals(*data, "--config", str(file)) == [
        f"--config {file}: unknown option epochs: here it is --num_train_epochs",
        f"--config {file}: unknown option zzz; --help lists all options",
        f"--config {file}: [optimizer]: options stand at the top of the file, in no table",
        f"--config {file}: [directory]: options stand at the top of the file, in no table",
    ]


def test_options_of_a_training_are_told_from_unknown_ones(data):
    with pytest.raises(UserError, match="unknown option --learning_rate: an option of engine.run; leave it out here"):
        build_command(["--family", "sd", "--pretrained_model_name_or_path", "a/b", *data, "--learning_rate", "1"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--use_ema=true"], "--use_ema/--no-use_ema takes no value"),
        (["--use_ema", "true"], "unexpected argument 'true'; quote values that hold spaces, and give switches none"),
        (["--output_dir="], "--output_dir is empty; a variable of the shell may not be set"),
        (["--dataset_name", ""], "--dataset_name is empty"),
        (["--validation_prompts", "a", "b\udcff"], "--validation_prompts 'b\\udcff' is not UTF-8"),
        (["--output_dir", "a\0b"], "--output_dir 'a\\x00b' holds a NUL character"),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant_are_named(arguments, said, data):
    [line] = refusals(*data, *arguments)
    assert line.startswith(said)
