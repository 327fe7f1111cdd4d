"""The options of buckets: as a switch or a list, on the command line and in a file, and what is said of mistakes."""

import pytest

from engine.config.command_line import parse, to_toml
from engine.config.options import TrainConfig
from engine.errors import UserError
from tests.config.arguments import run


def test_a_switch_or_a_list_on_the_command_line_and_in_a_file(data, tmp_path):
    assert run(*data).buckets is False
    assert run(*data, "--buckets").buckets is True
    assert run(*data, "--buckets", "--no-buckets").buckets is False
    assert run(*data, "--buckets", "512x512", "640X384,384x640").buckets == ["512x512", "640x384", "384x640"]
    assert run(*data, "--buckets", "512x512", "--buckets", "640x384").buckets == ["512x512", "640x384"]
    file = tmp_path / "run.toml"
    for written, read in (("true", True), ("false", False), ('["640x384", "512x512"]', ["640x384", "512x512"])):
        file.write_text(f"buckets = {written}\n")
        config = run(*data, "--config", str(file))
        assert config.buckets == read
        file.write_text(to_toml(config))
        assert run(*data, "--config", str(file)).buckets == read
    assert run(*data, "--config", str(file), "--buckets").buckets is True


def test_the_step_is_that_of_the_family(data):
    assert run(*data).bucket_step == 64
    assert parse(TrainConfig, "engine.run", "", ["--family", "wuerstchen", *data]).bucket_step == 128


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--buckets", "true"], "--buckets ['true']: give sizes as WIDTHxHEIGHT, for example 640x384, or no value"),
        (["--buckets", "512x0"], "--buckets ['512x0']: give sizes as WIDTHxHEIGHT"),
        (["--buckets", "512x512", "512x512"], "--buckets 512x512: stands there twice"),
        (["--bucket_step", "32"], "--bucket_step needs --buckets"),
        (["--bucket_area", "4096"], "--bucket_area needs --buckets"),
        (
            ["--buckets", "512x512", "--bucket_max_ratio", "2"],
            "--bucket_max_ratio shapes sizes that --buckets makes, and it is",
        ),
        (["--buckets", "--bucket_area", "4095"], "--bucket_area 4095: no size in steps of --bucket_step 64 has so few pixels"),
        (["--buckets", "--resolution", "32"], "--resolution 32: no size in steps of --bucket_step 64 has so few pixels"),
        (["--buckets", "--bucket_max_ratio", "0.5"], "--bucket_max_ratio '0.5': input should be greater than or equal to 1"),
        (["--enable_bucket"], "unknown option --enable_bucket: here it is --buckets"),
        (["--bucket_reso_steps", "64"], "unknown option --bucket_reso_steps: here it is --bucket_step"),
        (["--min_bucket_reso", "256"], "unknown option --min_bucket_reso: here it is --bucket_max_ratio"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_a_remedy(arguments, said, data):
    with pytest.raises(UserError) as error:
        run(*data, *arguments)
    assert str(error.value).splitlines()[0].startswith(said)


def test_the_prior_has_no_buckets(data):
    with pytest.raises(UserError, match="--buckets, --bucket_step is not used by kandinsky-prior; leave it out"):
        parse(TrainConfig, "engine.run", "", ["--family", "kandinsky-prior", *data, "--buckets", "--bucket_step", "64"])
