"""The command line of a run of Stable Diffusion."""

from engine.config.command_line import parse
from engine.config.options import TrainConfig


def run(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, "engine.run", "", ["--family", "sd", "--pretrained_model_name_or_path", "org/model", *arguments])
