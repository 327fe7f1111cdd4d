"""The command line and the TOML file: names, defaults, precedence, and one clear line for every mistake."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib

import pytest
import tomli_w

from engine import checkpoint
from engine.config.command_line import load, parse, to_toml
from engine.config.options import TrainConfig
from engine.config.schema import SECRETS
from engine.errors import UserError, exit_code
from engine.shards import info_command
from tests.commands import environment

# The flags of diffusers' train_text_to_image.py and their defaults. Two differ on purpose: --mixed_precision is `no` where the
# script asks accelerate, and --report_to does not offer comet_ml.
SCRIPT = {
    "input_perturbation": 0, "revision": None, "variant": None, "dataset_name": None, "dataset_config_name": None,
    "train_data_dir": None, "image_column": "image", "caption_column": "text", "max_train_samples": None,
    "validation_prompts": None, "output_dir": "sd-model-finetuned", "cache_dir": None, "seed": None, "resolution": 512,
    "center_crop": False, "random_flip": False, "train_batch_size": 16, "num_train_epochs": 100, "max_train_steps": None,
    "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-4, "scale_lr": False,
    "lr_scheduler": "constant", "lr_warmup_steps": 500, "snr_gamma": None, "dream_training": False,
    "dream_detail_preservation": 1.0, "use_8bit_adam": False, "allow_tf32": False, "use_ema": False, "offload_ema": False,
    "foreach_ema": False, "non_ema_revision": None, "dataloader_num_workers": 0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "push_to_hub": False, "hub_token": None,
    "prediction_type": None, "hub_model_id": None, "logging_dir": "logs", "mixed_precision": "no",
    "report_to": "tensorboard", "local_rank": -1, "checkpointing_steps": 500, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "enable_xformers_memory_efficient_attention": False, "noise_offset": 0,
    "validation_epochs": 5, "tracker_project_name": "text2image-fine-tune", "image_interpolation_mode": "lanczos",
}  # fmt: skip


# The flags of the Kandinsky and Wuerstchen scripts that differ from those above, and those of the above that they do not have.
OTHER_SCRIPTS = {
    "kandinsky-prior": {
        "pretrained_prior_model_name_or_path": "kandinsky-community/kandinsky-2-2-prior",
        "pretrained_decoder_model_name_or_path": "kandinsky-community/kandinsky-2-2-decoder",
        "output_dir": "kandi_2_2-model-finetuned", "train_batch_size": 1, "adam_weight_decay": 0.0,
    },
    "kandinsky-decoder": {
        "pretrained_prior_model_name_or_path": "kandinsky-community/kandinsky-2-2-prior",
        "pretrained_decoder_model_name_or_path": "kandinsky-community/kandinsky-2-2-decoder",
        "output_dir": "kandi_2_2-model-finetuned", "train_batch_size": 1, "adam_weight_decay": 0.0,
    },
    "wuerstchen": {
        "pretrained_prior_model_name_or_path": "warp-ai/wuerstchen-prior",
        "pretrained_decoder_model_name_or_path": "warp-ai/wuerstchen",
        "pretrained_image_encoder_name_or_path": "dome272/wuerstchen",
        "output_dir": "wuerstchen-model-finetuned", "train_batch_size": 1, "adam_weight_decay": 0.0,
    },
}  # fmt: skip
SD_ONLY = {
    "pretrained_model_name_or_path": "x", "revision": "x", "variant": "x", "non_ema_revision": "x", "center_crop": None,
    "random_flip": None, "random_crops": "2", "image_interpolation_mode": "box", "input_perturbation": "0.1",
    "noise_offset": "0.1", "prediction_type": "epsilon", "dream_training": None, "dream_detail_preservation": "1",
}  # fmt: skip
XFORMERS = {"enable_xformers_memory_efficient_attention": None}
LACKING = {
    "sd": {
        "pretrained_prior_model_name_or_path": "x", "pretrained_decoder_model_name_or_path": "x",
        "pretrained_image_encoder_name_or_path": "x",
    },
    "kandinsky-prior": SD_ONLY | XFORMERS | {"gradient_checkpointing": None, "pretrained_image_encoder_name_or_path": "x"},
    "kandinsky-decoder": SD_ONLY | {"caption_column": "x", "pretrained_image_encoder_name_or_path": "x"},
    "wuerstchen": SD_ONLY | XFORMERS,
}  # fmt: skip


def run(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, "engine.run", "", ["--family", "sd", "--pretrained_model_name_or_path", "org/model", *arguments])


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def data(tmp_path) -> list[str]:
    return ["--train_data_dir", str(tmp_path)]


@pytest.mark.parametrize("name", SCRIPT)
def test_every_flag_of_the_script_keeps_its_default(name, data):
    config = run(*data)
    expected = data[1] if name == "train_data_dir" else SCRIPT[name]
    assert getattr(config, name) == expected


@pytest.mark.parametrize("family", OTHER_SCRIPTS)
def test_the_other_scripts_keep_their_defaults(family, data):
    config = parse(TrainConfig, "engine.run", "", ["--family", family, *data])
    script = {name: value for name, value in SCRIPT.items() if name not in LACKING[family]} | OTHER_SCRIPTS[family]
    expected = script | {"train_data_dir": data[1]}
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, lacking in LACKING.items() for name in lacking])
def test_flags_that_a_family_lacks_are_refused_by_name(family, name, data, tmp_path):
    value = LACKING[family][name]
    model = ["--pretrained_model_name_or_path", "org/model"] if family == "sd" else []
    arguments = ["--family", family, *model, *data, f"--{name}", *([value] if value else [])]
    with pytest.raises(UserError, match=f"^--{name} is not used by {family}"):
        parse(TrainConfig, "engine.run", "", arguments)
    file = tmp_path / "run.toml"
    file.write_text(f'family = "{family}"\n{name} = {value!r}\n' if value else f'family = "{family}"\n{name} = false\n')
    with pytest.raises(UserError, match=f"^--{name} is not used by {family}"):
        parse(TrainConfig, "engine.run", "", ["--config", str(file), *model, *data])


@pytest.mark.parametrize("family", ["kandinsky-prior", "kandinsky-decoder", "wuerstchen"])
def test_the_stored_configuration_holds_only_what_the_family_has(family, data, tmp_path):
    config = parse(TrainConfig, "engine.run", "", ["--family", family, *data, "--seed", "3"])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert not LACKING[family].keys() & tomllib.loads(file.read_text()).keys()
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]) == config


def test_the_stored_configuration_of_a_divided_batch_is_read_back(data, tmp_path):
    """The run has set the accumulation, which cannot be given beside the whole batch."""
    config = run(*data, "--global_batch_size", "64")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config.model_copy(update={"gradient_accumulation_steps": 2})))
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]) == config


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


def test_a_file_may_hold_everything(data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'family = "sd"\npretrained_model_name_or_path = "a/b"\ntrain_data_dir = "{data[1]}"\n')
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]).pretrained_model_name_or_path == "a/b"


def test_the_stored_configuration_is_read_back_and_keeps_no_secret(data, tmp_path):
    config = run(*data, "--hub_token", "very-secret", "--validation_prompts", 'quo"te', "--seed", "9")
    text = to_toml(config)
    assert "very-secret" not in text
    assert {"hub_token"} == SECRETS
    file = tmp_path / "config.toml"
    file.write_text(text)
    again = parse(TrainConfig, "engine.run", "", ["--config", str(file)])
    assert again == config.model_copy(update={"hub_token": None})


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
    ],
)
def test_mistakes_are_named_with_a_remedy(arguments, named, data):
    assert named in refusal(*data, *arguments)


def test_several_mistakes_are_all_named(data):
    message = refusal(*data, "--resolution", "x", "--seed", "-1")
    assert "--resolution" in message
    assert "--seed" in message


@pytest.mark.parametrize(
    ("text", "named"), [("resolutoin = 3", "unknown option resolutoin; did you mean resolution?"), ("a = ", "not valid TOML")]
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


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as leave:
        parse(TrainConfig, "engine.run", "Train.", ["--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    for group in ("model:", "data:", "training:", "optimizer:", "objective:", "output:", "checkpoints:"):
        assert f"\n{group}\n" in text
    for name in SCRIPT:
        assert f"--{name}" in text


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


STORED = {"family": "sd", "pretrained_model_name_or_path": "org/model", "shards_dir": "shards"}
# A stored configuration that is wrong -> what is said of it.
STORED_MISTAKES = [
    (STORED | {"resolution": "wide"}, "--resolution 'wide': input should be a valid integer"),
    (STORED | {"resolutoin": 3}, "unknown option resolutoin; did you mean resolution?"),
    (STORED | {"family": "flux"}, "--family 'flux': input should be 'sd', 'kandinsky-prior', 'kandinsky-decoder' or"),
    (STORED | {"family": ["sd"]}, "--family ['sd']: input should be 'sd'"),
    (STORED | {"family": "wuerstchen"}, "--pretrained_model_name_or_path is not used by wuerstchen; leave it out"),
    ({"family": "sd", "shards_dir": "shards"}, "--pretrained_model_name_or_path is required"),
    ({"shards_dir": "shards"}, "--family is required"),
]


def said(command, arguments: list, capsys) -> str:
    """The one line that a command says of a mistake."""
    assert exit_code("engine", lambda: command(list(map(str, arguments)))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("content", "named"),
    [
        *((tomli_w.dumps(values).encode(), named) for values, named in STORED_MISTAKES),
        (tomli_w.dumps(STORED | {"offload_ema": True}).encode(), "--offload_ema needs --use_ema"),
        (b"resolution = ", "not valid TOML"),
        (b"# \xff", "not valid TOML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_mistake_in_the_configuration_of_a_checkpoint_names_its_file(content, named, tmp_path, capsys):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "manifest.json").write_text("{}")
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    arguments = [tmp_path / "checkpoint-4", "--output_dir", tmp_path / "pipeline"]
    assert f"engine: error: {file}: {named}" in said(checkpoint.export_command, arguments, capsys)


@pytest.mark.parametrize(("values", "named"), STORED_MISTAKES)
def test_a_mistake_in_the_configuration_of_shards_names_their_index(values, named, shards, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "shards")
    index = tmp_path / "shards" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"config": values}))
    assert f"engine: error: {index}: {named}" in said(info_command, [tmp_path / "shards"], capsys)


@pytest.mark.parametrize("content", [b'{"format_version": ', b"\xff", b"[1]"])
def test_an_index_that_is_none_is_named(content, tmp_path, capsys):
    index = tmp_path / "index.json"
    index.write_bytes(content)
    assert f"engine: error: {index}: not a readable index" in said(info_command, [tmp_path], capsys)


def test_a_configuration_is_read_where_its_data_and_packages_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    values = STORED | {"train_data_dir": "/nowhere", "pretrained_model_name_or_path": "/nowhere", "use_8bit_adam": True}
    assert load(TrainConfig, values).use_8bit_adam
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    with pytest.raises(UserError, match="--train_data_dir /nowhere: no such directory"):
        parse(TrainConfig, "engine.run", "", ["--config", str(tmp_path / "run.toml")])
