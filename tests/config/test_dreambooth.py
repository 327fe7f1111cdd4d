"""DreamBooth's options: the data sets that they make, and what is said of mistakes in them."""

import pytest

from engine.config.command_line import parse, to_toml
from engine.config.mixture import data_sets_of
from engine.config.options import CacheConfig, TrainConfig
from engine.errors import UserError
from tests.config.arguments import run

INSTANCE = ["--instance_data_dir", "@/instance", "--instance_prompt", "sks dog"]
CLASS = ["--with_prior_preservation", "--class_data_dir", "@/class", "--class_prompt", "dog"]


@pytest.fixture
def given(tmp_path):
    """A run's configuration from a command line in which @ is a directory with images of an instance."""
    (tmp_path / "instance").mkdir()

    def given(*arguments: str) -> TrainConfig:
        return run(*(text.replace("@", str(tmp_path)) for text in arguments))

    return given


def test_instance_and_class_are_two_data_sets(given, tmp_path):
    config = given(*INSTANCE, *CLASS, "--prior_loss_weight", "0.5", "--output_dir", "@/out", "--num_class_images", "7")
    instance, of_class = data_sets_of(config)
    assert [each.config.train_data_dir for each in (instance, of_class)] == [
        str(tmp_path / name) for name in ("instance", "class")
    ]
    assert [each.config.prompt for each in (instance, of_class)] == ["sks dog", "dog"]
    assert [each.config.max_train_samples for each in (instance, of_class)] == [None, 7]
    assert [(each.loss_weight, each.prior) for each in (instance, of_class)] == [(1.0, False), (0.5, True)]
    assert [each.config.shards_path.name for each in (instance, of_class)] == ["instance", "class"]
    assert config.micro_batches == 2
    assert config.recipe == "dreambooth"
    assert [each.name for each in data_sets_of(given(*INSTANCE))] == ["instance"]


def test_what_is_stored_is_the_same_run_again(given, tmp_path):
    config = given(*INSTANCE, *CLASS, "--gradient_accumulation_steps", "3", "--output_dir", "@/out", "--seed", "1")
    (tmp_path / "config.toml").write_text(to_toml(config))
    again = parse(TrainConfig, "engine.run", "", ["--config", str(tmp_path / "config.toml")])
    assert again == config
    built = parse(CacheConfig, "engine.shards build", "", ["--config", str(tmp_path / "config.toml")], TrainConfig)
    assert [each.config.shards_path for each in data_sets_of(built)] == [
        each.config.shards_path for each in data_sets_of(config)
    ]


@pytest.mark.parametrize("trained", [["--rank", "4"], ["--train_text_encoder"], []], ids=str)
@pytest.mark.parametrize("data", [INSTANCE, ["--train_data_dir", INSTANCE[1]]], ids=["dreambooth", "usual"])
def test_shards_are_built_as_a_run_of_the_same_options_has_them(given, tmp_path, trained, data):
    (tmp_path / "run.toml").write_text(to_toml(given(*data, *trained)))
    model = ["--family", "sd", "--pretrained_model_name_or_path", "org/model"]
    typed = [text.replace("@", str(tmp_path)) for text in (*model, *data, *trained)]
    for arguments in (["--config", str(tmp_path / "run.toml")], typed):
        built = parse(CacheConfig, "engine.shards build", "", arguments, TrainConfig)
        run = parse(TrainConfig, "engine.run", "", arguments)
        assert dict(built).items() <= dict(run).items()
        assert built.shards_path == run.shards_path


def test_a_decoder_needs_no_captions(tmp_path):
    (tmp_path / "instance").mkdir()
    folders = ["--instance_data_dir", str(tmp_path / "instance"), "--class_data_dir", str(tmp_path / "class")]
    arguments = ["--family", "kandinsky-decoder", *folders, "--with_prior_preservation", "--class_prompt", "dog"]
    assert [each.config.prompt for each in data_sets_of(parse(TrainConfig, "engine.run", "", arguments))] == [None, None]
    with pytest.raises(UserError, match="--instance_prompt is not used by kandinsky-decoder"):
        parse(TrainConfig, "engine.run", "", [*arguments, "--instance_prompt", "sks dog"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (INSTANCE[:2], "--instance_data_dir needs --instance_prompt"),
        (INSTANCE[2:], "--instance_prompt needs --instance_data_dir"),
        (["--instance_data_dir", "@/absent", *INSTANCE[2:]], "--instance_data_dir .*/absent: no such directory"),
        ([*INSTANCE, "--train_data_dir", "@/instance"], "--train_data_dir beside DreamBooth's data sets; give its folder as"),
        ([*INSTANCE, *CLASS[:3]], "--with_prior_preservation needs --class_prompt"),
        ([*INSTANCE, CLASS[0], *CLASS[3:]], "--with_prior_preservation needs --class_data_dir"),
        (CLASS[:1], "--with_prior_preservation needs --instance_data_dir, or --shards_dir"),
        ([*INSTANCE, *CLASS, "--class_data_dir", "@/instance"], "--class_data_dir .*/instance: holds the instance"),
        ([*INSTANCE, *CLASS, "--class_data_dir", "@/instance/class"], "--class_data_dir .*/class: lies in --instance_data_dir"),
        ([*INSTANCE, *CLASS, "--class_data_dir", "@"], "--class_data_dir .*: holds the instance"),
        ([*INSTANCE, *CLASS, "--prior_loss_weight", "-1"], "--prior_loss_weight '-1': input should be greater"),
        ([*INSTANCE, "--shards_dir", "s3://bucket/shards"], "--shards_dir s3://bucket/shards: shards are read there"),
    ],
)  # fmt: skip
def test_mistakes_are_named(given, arguments, said):
    with pytest.raises(UserError, match=f"^{said}"):
        given(*arguments)


def test_a_class_without_prior_preservation_is_passed_over(given, capsys):
    config = given(*INSTANCE, *CLASS[1:])
    assert len(data_sets_of(config)) == 1
    assert "--class_data_dir is passed over without --with_prior_preservation" in capsys.readouterr().err
