"""The [[data]] tables of a TOML file: what they may hold, what is said of mistakes, and how they are written back."""

import tomllib
from fractions import Fraction
from pathlib import Path

import pytest

from engine.config.command_line import parse, to_toml
from engine.config.mixture import data_sets_of
from engine.config.options import TrainConfig
from engine.errors import UserError
from tests.config.arguments import run


def read(tmp_path: Path, text: str, *arguments: str) -> TrainConfig:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir(exist_ok=True)
    file = tmp_path / "run.toml"
    file.write_text(text.replace("@/", f"{tmp_path}/"))
    return run("--config", str(file), *arguments)


CATS = '[[data]]\nname = "cats"\ntrain_data_dir = "@/cats"\n'
DOGS = '[[data]]\ntrain_data_dir = "@/dogs"\n'


def test_a_table_wins_over_what_stands_outside(tmp_path):
    config = read(
        tmp_path,
        f'caption_column = "outside"\ncenter_crop = true\n{CATS}caption_column = "inside"\nweight = 0.1\n{DOGS}'
        "center_crop = false\nweight = 3\n",
        "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    cats, dogs = data_sets_of(config)
    assert [each.name for each in (cats, dogs)] == ["cats", "dogs"]
    assert [each.weight for each in (cats, dogs)] == [Fraction(1, 10), 3]
    assert [each.config.caption_column for each in (cats, dogs)] == ["inside", "outside"]
    assert [each.config.center_crop for each in (cats, dogs)] == [True, False]
    assert [each.config.shards_path for each in (cats, dogs)] == [
        tmp_path / "out" / "shards" / name for name in ("cats", "dogs")
    ]


def test_data_that_stand_outside_are_those_of_tables_that_name_none(tmp_path, capsys):
    tables = '[[data]]\ndataset_config_name = "a"\n[[data]]\ndataset_config_name = "b"\n'
    config = read(tmp_path, f'dataset_name = "org/set"\n{tables}')
    assert [each.config.dataset_name for each in data_sets_of(config)] == ["org/set"] * 2
    assert [each.config.dataset_config_name for each in data_sets_of(config)] == ["a", "b"]
    assert [each.name for each in data_sets_of(config)] == ["data", "data_2"]
    config = read(tmp_path, f'dataset_name = "org/set"\n{CATS}')
    assert [each.config.dataset_name for each in data_sets_of(config)] == [None]
    assert "org/set is passed over, because every [[data]] table names data of its own" in capsys.readouterr().err


def test_shards_of_tables_lie_below_an_address_too(tmp_path):
    tables = '[[data]]\nname = "cats"\n[[data]]\nname = "dogs"\nshards_dir = "s3://other/dogs"\n'
    config = read(tmp_path, f'shards_dir = "https://host/shards/?token=a"\nreport_to = "none"\n{tables}')
    assert [each.config.shards_address for each in data_sets_of(config)] == [
        "https://host/shards/cats?token=a",
        "s3://other/dogs",
    ]


def test_tables_are_written_back_with_whole_paths_and_without_secrets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = '[[data]]\nname = "there"\nshards_dir = "https://user:secret@host/shards?token=secret"\nrepeats = 0.5\n'
    config = read(tmp_path, CATS.replace("@/", "") + DOGS + there, "--report_to", "none")
    text = to_toml(config)
    assert "secret" not in text
    tables = tomllib.loads(text)["data"]
    assert tables[:2] == [
        {"name": "cats", "train_data_dir": str(tmp_path / "cats")},
        {"train_data_dir": str(tmp_path / "dogs")},
    ]
    assert tables[2] == {"name": "there", "shards_dir": "https://host/shards", "repeats": 0.5}
    (tmp_path / "config.toml").write_text(text)
    monkeypatch.chdir("/")
    again = data_sets_of(parse(TrainConfig, "engine.run", "", ["--config", str(tmp_path / "config.toml")]))
    assert [each.config.train_data_dir for each in again[:2]] == [str(tmp_path / name) for name in ("cats", "dogs")]


def test_a_folder_given_twice_is_two_data_sets(tmp_path):
    folders = [tmp_path / "a" / "train", tmp_path / "b" / "train"]
    for folder in folders:
        folder.mkdir(parents=True)
    config = run("--train_data_dir", str(folders[0]), "--train_data_dir", str(folders[1]), "--output_dir", str(tmp_path))
    assert [(each.name, each.config.train_data_dir) for each in data_sets_of(config)] == [
        ("train", str(folders[0])), ("train_2", str(folders[1])),
    ]  # fmt: skip
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{CATS}zzz = 4", ["[[data]] cats: unknown key zzz; there are name, weight, repeats, loss_weight, train_data_dir"]),
        (f"{CATS}reapets = 4", ["[[data]] cats: unknown key reapets; did you mean repeats?"]),
        (f"{CATS}num_repeats = 4", ["[[data]] cats: unknown key num_repeats; did you mean repeats?"]),
        (f"{CATS}resolution = 4", ["[[data]] cats: resolution is of the whole run; write it above the tables"]),
        (f"{CATS}weight = 1\nrepeats = 2", ["[[data]] cats: has both weight and repeats; give one of them"]),
        (
            f"{CATS}weight = 1\n{DOGS}",
            ["[[data]] number 2: has no weight, and others have; give every table a weight, or none"],
        ),
        (CATS + CATS, ["[[data]]: 2 tables have the name 'cats'; give each its own"]),
        (
            f'{CATS}shards_dir = "@/s"\n{DOGS}shards_dir = "@/s/../s"',
            ["[[data]]: cats and dogs have the same shards_dir; give each its own"],
        ),
        (f"{CATS}repeats = 0", ["[[data]] cats: repeats 0: give a number above 0"]),
        (f"{CATS}weight = true", ["[[data]] cats: weight True: give a number above 0"]),
        (f"{CATS}weight = nan", ["[[data]] cats: weight nan: give a number above 0"]),
        ('[[data]]\nname = "../up"', ["[[data]] number 1: name '../up': give letters, digits, _, - and . alone"]),
        ('[[data]]\nname = "64x64"', ["[[data]] 64x64: name '64x64': is taken for other shards; give another"]),
        ('[[data]]\nname = "validation"', ["[[data]] validation: name 'validation': is taken for other shards"]),
        (f'{CATS}max_train_samples = "x"', ["[[data]] cats: --max_train_samples 'x': input should be a valid integer"]),
        (f"{CATS}shuffle_tags = true", ["[[data]] cats: --shuffle_tags needs --cache_text tokens, or --caption_variants"]),
        ('[[data]]\ntrain_data_dir = "@/birds"', ["[[data]] birds: --train_data_dir @/birds: no such directory"]),
        (f'validation_data_dir = "@/held"\n{CATS}', ["--validation_data_dir @/held: no such directory"]),
        ('[[data]]\nname = "none"', ["[[data]] none: --shards_dir"]),
        ("[data]\nweight = 1", ["[data]: write a table [[data]] for each data set"]),
        ("data = []", ["[data]: write a table [[data]] for each data set"]),
        (f"{CATS}a = 1\nb = 2", ["[[data]] cats: unknown key a", "[[data]] cats: unknown key b"]),
    ],
    ids=str,
)
def test_mistakes_are_named_a_line_each(text, said, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    lines = [line.removeprefix(f"--config {tmp_path / 'run.toml'}: ") for line in error.value.lines]
    expected = [each.replace("@/", f"{tmp_path}/") for each in said]
    assert [line[: len(each)] for line, each in zip(lines, expected, strict=True)] == expected


def test_options_of_captions_are_refused_in_tables_of_families_without_them(tmp_path):
    (tmp_path / "cats").mkdir()
    file = tmp_path / "run.toml"
    file.write_text(f'family = "kandinsky-decoder"\n{CATS}caption_prefix = "a"\n'.replace("@", str(tmp_path)))
    with pytest.raises(UserError, match=r"^\[\[data\]\] cats: --caption_prefix is not used by kandinsky-decoder"):
        parse(TrainConfig, "engine.run", "", ["--config", str(file)])


@pytest.mark.parametrize("family", ["kandinsky-prior", "kandinsky-decoder", "wuerstchen"])
def test_every_family_takes_tables(family, tmp_path):
    (tmp_path / "run.toml").write_text(f'family = "{family}"\n{CATS}{DOGS}'.replace("@/", f"{tmp_path}/"))
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
    config = parse(TrainConfig, "engine.run", "", ["--config", str(tmp_path / "run.toml")])
    assert [each.config.family for each in data_sets_of(config)] == [family] * 2


def test_a_table_may_have_a_caption_of_all_and_a_weight_of_its_losses(tmp_path):
    config = read(tmp_path, f'{CATS}prompt = "a cat"\nloss_weight = 0.5\n{DOGS}')
    assert [(each.config.prompt, each.loss_weight) for each in data_sets_of(config)] == [("a cat", 0.5), (None, 1.0)]
    assert config.recipe == ""
    with pytest.raises(UserError, match=r"\[\[data\]\] cats: loss_weight -1: give a number from 0 to 1e9"):
        read(tmp_path, f"{CATS}loss_weight = -1\n{DOGS}")
