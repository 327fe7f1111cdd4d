"""The command line and the TOML file: precedence, and one clear line for every mistake."""

import importlib.util
import subprocess
import sys

import pytest

from engine.config import checks
from engine.config.command_line import parse
from engine.config.options import TrainConfig
from engine.errors import UserError
from tests.commands import environment
from tests.config.arguments import run


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_take_the_types_of_their_options(data):
    config = run(
        *data, "--resolution", "256", "--learning_rate=3e-5", "--center_crop", "--validation_prompts", "a b", "c",
        "--snr_gamma", "5",
    )  # fmt: skip
    assert (config.resolution, config.learning_rate, config.center_crop) == (256, 3e-5, True)
    assert config.validation_prompts == ["a b", "c"]
    assert config.snr_gamma == 5.0


def test_the_command_line_wins_over_the_file(data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('resolution = 128\nuse_ema = true\nvalidation_prompts = ["x"]\nseed = 4\n')
    config = run(*data, "--config", str(file), "--resolution", "64", "--no-use_ema")
    assert (config.resolution, config.use_ema, config.seed) == (64, False, 4)
    assert config.validation_prompts == ["x"]


@pytest.mark.parametrize(
    ("stored", "arguments", "optimizer"),
    [
        ("AdamW8bit", ["--no-use_8bit_adam"], "adamw"),
        ("adamw8bit", ["--optimizer", "lion"], "lion"),
        ("lion", ["--no-use_8bit_adam"], "lion"),
        ("adamw", ["--use_8bit_adam"], "adamw8bit"),
    ],
)
def test_the_command_line_wins_over_an_optimizers_other_name(stored, arguments, optimizer, data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'optimizer = "{stored}"\nuse_8bit_adam = {str("8" in stored).lower()}\n')
    config = run(*data, "--config", str(file), *arguments)
    assert (config.optimizer, config.use_8bit_adam) == (optimizer, optimizer == "adamw8bit")


def test_a_file_may_hold_everything(data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'family = "sd"\npretrained_model_name_or_path = "a/b"\ntrain_data_dir = "{data[1]}"\n')
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]).pretrained_model_name_or_path == "a/b"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--resolutoin", "3"], "unknown option --resolutoin; did you mean --resolution?"),
        (["--zzz"], "unknown option --zzz; --help lists all options"),
        (["stray"], "unexpected argument 'stray'"),
        (["--resolution", "abc"], "--resolution 'abc': input should be a valid integer"),
        (["--train_batch_size", "0"], "--train_batch_size '0': input should be greater than or equal to 1"),
        (["--prediction_type", "flow"], "--prediction_type 'flow': input should be 'epsilon', 'v_prediction' or 'sample'"),
        (["--zero_stage", "7"], "--zero_stage '7'"),
        (["--resolution"], "argument --resolution: expected one argument"),
        (["--resume_from_checkpoint", "/nowhere"], "--resume_from_checkpoint /nowhere: no such directory"),
        (["--offload_ema"], "--offload_ema needs --use_ema"),
        (["--compile_cache_dir", "cache"], "--compile_cache_dir needs --compile"),
        (["--report_to", "wandb", "--hub_token", "t"], "--hub_token with --report_to wandb would expose the token"),
        (["--config", "/nowhere.toml"], "--config /nowhere.toml: No such file or directory"),
        (["--seed", str(2**63)], "--seed"),
        (["--learning_rate", "inf"], "--learning_rate 'inf': input should be a finite number"),
        (["--max_train_steps", str(10**30)], f"--max_train_steps {10**30}: too large"),
        (["--output_dir", "/proc/x"], "--output_dir /proc/x: cannot be written: No such file or directory"),
        (["--logging_dir", "/elsewhere"], "--logging_dir /elsewhere: leads out of the output directory; name a folder in it"),
        (["--offload_optimizer", "nvme", "--nvme_path", "/proc/x"], "--nvme_path /proc/x: cannot be written"),
        (["--shards_dir", "x" * 300], "cannot be written: File name too long"),
    ],
)
def test_mistakes_are_named_with_a_remedy(arguments, named, data):
    assert named in refusal(*data, *arguments)


def test_several_mistakes_are_all_named(data):
    with pytest.raises(UserError) as error:
        run(*data, "--resolution", "x", "--seed", "-1")
    first, second = str(error.value).splitlines()
    assert "--seed" in first + second
    assert "--resolution" in first + second


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("resolutoin = 3", "unknown option resolutoin; did you mean resolution?"),
        ("a = ", "not valid TOML"),
        ("rank = 4\nlora_rank = 8", "rank and lora_rank are one option; leave one out"),
    ],
)
def test_mistakes_in_the_file_name_the_file(text, named, data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text)
    message = refusal(*data, "--config", str(file))
    assert str(file) in message
    assert named in message


def test_missing_data_and_directories_are_named(tmp_path):
    assert "no data: give --train_data_dir, --dataset_name, or --shards_dir" in refusal()
    assert "--train_data_dir /nowhere: no such directory" in refusal("--train_data_dir", "/nowhere")
    with pytest.raises(UserError, match="--pretrained_model_name_or_path is required"):
        parse(TrainConfig, "engine.run", "", ["--family", "sd"])
    for model, named in (("/nowhere", "no such directory"), (str(tmp_path), "no model_index.json there")):
        with pytest.raises(UserError, match=named):
            parse(TrainConfig, "", "", ["--family", "sd", "--pretrained_model_name_or_path", model, "--shards_dir", "x"])


@pytest.mark.parametrize("index", ["index.json", "buckets.json"])
def test_shards_that_may_only_be_read_are_taken(index, data, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / index).touch()
    asked = []
    monkeypatch.setattr(checks, "check_writable", lambda flag, path: asked.append(flag))
    run(*data, "--shards_dir", str(tmp_path / "shards"))
    assert "--output_dir" in asked
    assert "--shards_dir" not in asked


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "engine.run", "--family", "sd", "--pretrained_model_name_or_path", "/nowhere",
        "--train_data_dir", str(tmp_path), "--output_dir", str(output),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "engine.run: error: --pretrained_model_name_or_path /nowhere: no such directory\n"
    assert not output.exists()


@pytest.mark.parametrize(("arguments", "package"), [(["--report_to", "wandb"], "wandb"), (["--use_8bit_adam"], "bitsandbytes")])
def test_an_extra_that_is_not_installed_is_named(arguments, package, data, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"needs {package}, which is not installed: install the extra `{package}`" in refusal(*data, *arguments)


def test_a_file_in_the_way_of_the_output_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; name a directory" in refusal(*data, "--output_dir", str(tmp_path / "file" / "out"))


def test_a_checkpoint_may_be_named_within_the_output_directory(data, tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    config = run(*data, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "checkpoint-5")
    assert config.resume_from_checkpoint == "checkpoint-5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--enable_xformers_memory_efficient_attention", "--attention", "flash"],
            "contradicts --attention flash; leave one out",
        ),
        (["--deterministic", "--attention", "cudnn"], "--deterministic: the attention of cudnn does not repeat its gradients"),
        (["--deterministic", "--attention", "xformers"], "--deterministic: the attention of xformers does not"),
        (["--deterministic", "--enable_xformers_memory_efficient_attention"], "--deterministic: the attention of xformers"),
        (["--compile_mode", "max-autotune-no-cudagraphs"], "--compile_mode needs --compile"),
        (["--compile", "--compile_mode", "max-autotune"], "--compile_mode 'max-autotune': input should be 'default' or"),
    ],
)
def test_backends_that_contradict_each_other_are_refused(images, arguments, message):
    assert message in refusal("--train_data_dir", str(images), *arguments)


def test_both_names_of_xformers_attention_are_one(images):
    for arguments in (["--enable_xformers_memory_efficient_attention"], ["--attention", "xformers"]):
        assert run("--train_data_dir", str(images), *arguments).uses_xformers
    assert not run("--train_data_dir", str(images), "--attention", "flash").uses_xformers
    with pytest.raises(UserError, match="--attention xformers is not used by wuerstchen; leave it out"):
        parse(TrainConfig, "engine.run", "", [
            "--family", "wuerstchen", "--train_data_dir", str(images), "--attention", "xformers",
        ])  # fmt: skip
