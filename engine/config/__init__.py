"""Every option of a run: its name, type, default and meaning, from the command line or a TOML file.

The names, defaults and meanings are those of the diffusers training scripts; options that only this engine has are added
beside them. One pydantic model is the single source for the command line, the TOML file, `--help` and `config.toml`.
"""

import argparse
import difflib
import importlib.util
import os
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import UserError

SECRETS = {"hub_token"}

FamilyName = Literal["sd", "kandinsky-prior", "kandinsky-decoder", "wuerstchen"]
FAMILIES: tuple[str, ...] = get_args(FamilyName)
KANDINSKY = ("kandinsky-prior", "kandinsky-decoder")
CAPTIONED = ("sd", "kandinsky-prior", "wuerstchen")
XFORMERS = ("sd", "kandinsky-decoder")  # families whose attention xFormers can take
REQUIRED = ...
PIPELINE_OPTIONS = (
    "pretrained_model_name_or_path",
    "pretrained_prior_model_name_or_path",
    "pretrained_decoder_model_name_or_path",
)


def option(default: Any, help: str, group: str, **constraints: Any) -> Any:
    """A field of the configuration, with what `--help` needs to describe it.

    A default that is a dictionary gives the defaults by family, `REQUIRED` where there is none. Families that are not in it do
    not have the option, and what the field then holds means nothing.
    """
    by_family = default if isinstance(default, dict) else None
    if by_family:
        default = next(iter(by_family.values()))
        default = None if default is REQUIRED else default
    return Field(default, description=help, json_schema_extra={"group": group, "by_family": by_family}, **constraints)


def only(families: tuple[str, ...], default: Any) -> dict[str, Any]:
    """The default of an option that only these families have."""
    return dict.fromkeys(families, default)


def sd_differs(sd: Any, others: Any) -> dict[str, Any]:
    """The defaults of an option where `sd` has another than the other families."""
    return only(FAMILIES, others) | {"sd": sd}


class CacheConfig(BaseModel):
    """What shapes the content of the latent shards."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    family: FamilyName = option(
        ...,
        "Which model to train: sd (Stable Diffusion's UNet), kandinsky-prior or kandinsky-decoder (Kandinsky 2.2), "
        "wuerstchen (stage C).",
        "model",
    )
    pretrained_model_name_or_path: str = option(
        only(("sd",), REQUIRED), "Directory of a diffusers pipeline, or its name on the Hugging Face hub.", "model"
    )
    pretrained_prior_model_name_or_path: str = option(
        only(KANDINSKY, "kandinsky-community/kandinsky-2-2-prior") | {"wuerstchen": "warp-ai/wuerstchen-prior"},
        "Directory of the prior pipeline, or its name on the hub.",
        "model",
    )
    pretrained_decoder_model_name_or_path: str = option(
        only(KANDINSKY, "kandinsky-community/kandinsky-2-2-decoder") | {"wuerstchen": "warp-ai/wuerstchen"},
        "Directory of the decoder pipeline, or its name on the hub. The priors need it only to draw images.",
        "model",
    )
    pretrained_image_encoder_name_or_path: str = option(
        {"wuerstchen": "dome272/wuerstchen"},
        "The EfficientNet-V2-S image encoder: a .safetensors or .pt file, or a repository on the hub that holds "
        "model_v2_stage_b.pt.",
        "model",
    )
    revision: str | None = option(only(("sd",), None), "Revision of the pretrained model on the hub.", "model")
    variant: str | None = option(only(("sd",), None), "Variant of the pretrained model's files, for example fp16.", "model")
    cache_dir: str | None = option(None, "Where downloaded models and data sets are kept.", "model")

    dataset_name: str | None = option(
        None, "Data set on the hub, or a local path that `datasets.load_dataset` opens (parquet files too).", "data"
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set, if it has several.", "data")
    train_data_dir: str | None = option(
        None,
        "Folder of images with `metadata.jsonl` or `metadata.csv` (columns `file_name` and the caption column). "
        "With --dataset_name: its data directory.",
        "data",
    )
    image_column: str = option("image", "Column that holds the image.", "data")
    caption_column: str = option(only(CAPTIONED, "text"), "Column that holds a caption or a list of captions.", "data")
    max_train_samples: int | None = option(None, "Train on this many samples, drawn with --seed, instead of all.", "data", ge=1)
    resolution: int = option(
        512,
        "Images are resized and cropped to this many pixels on both sides (kandinsky-prior: the image encoder decides, and "
        "only validation images have this size).",
        "data",
        ge=8,
    )
    center_crop: bool = option(only(("sd",), False), "Crop the centre of each image instead of random places.", "data")
    random_flip: bool = option(only(("sd",), False), "Show each image mirrored half of the time.", "data")
    random_crops: int = option(
        only(("sd",), 4),
        "Random crops stored per image without --center_crop (an image that is already square needs one).",
        "data",
        ge=1,
    )
    image_interpolation_mode: Literal["nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"] = option(
        only(("sd",), "lanczos"), "How images are resized.", "data"
    )
    strict: bool = option(False, "Stop at the first image or caption that cannot be used, instead of skipping it.", "data")

    shards_dir: str | None = option(
        None, "Directory of the latent shards, built when absent. Default: `shards` in the output directory.", "data"
    )
    shard_records: int = option(1024, "Source samples per shard.", "data", ge=1)
    encode_batch_size: int = option(16, "Images encoded at a time while the shards are built.", "data", ge=1)
    dataloader_num_workers: int = option(
        0, "Threads that decode images while the shards are built; 0 decodes in the main thread.", "data", ge=0
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "Precision of weights, activations and shards; fp32 master weights are always kept.", "precision"
    )
    seed: int | None = option(
        None, "Seed of the run; drawn at random, and recorded, when not given.", "training", ge=0, lt=2**63
    )
    output_dir: str = option(
        {"sd": "sd-model-finetuned"}
        | only(KANDINSKY, "kandi_2_2-model-finetuned")
        | {"wuerstchen": "wuerstchen-model-finetuned"},
        "Where the trained pipeline, checkpoints and metrics go.",
        "output",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, values: dict[str, Any]) -> dict[str, Any]:
        family = values.get("family")
        defaults = {name: by_family[family] for name, by_family in options_by_family(cls).items() if family in by_family}
        return {name: value for name, value in defaults.items() if value is not REQUIRED} | values

    @property
    def shards_path(self) -> Path:
        return Path(self.shards_dir) if self.shards_dir else Path(self.output_dir) / "shards"


class TrainConfig(CacheConfig):
    """Every option of `python -m engine.run`."""

    non_ema_revision: str | None = option(
        only(("sd",), None),
        "Revision of the trained weights, when the non-EMA ones are kept apart. Default: --revision.",
        "model",
    )
    gradient_checkpointing: bool = option(
        only(("sd", "kandinsky-decoder", "wuerstchen"), False),
        "Recompute activations in the backward pass to save memory.",
        "model",
    )
    enable_xformers_memory_efficient_attention: bool = option(
        only(XFORMERS, False), "The scripts' name of --attention xformers.", "model"
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "xformers"] = option(
        "auto",
        "Kernel of attention: auto chooses by card and shape, another is refused where it cannot run a shape of the model "
        "(xformers: sd, kandinsky-decoder only).",
        "model",
    )
    compile: bool = option(False, "Compile the trained model with torch.compile.", "model")
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = option(
        "default", "With --compile, how long to search: max-autotune times several kernels for each matrix product.", "model"
    )
    compile_cache_dir: str | None = option(
        None, "Where compiled code is kept, so that a restart does not compile again. Default: torch's temporary one.", "model"
    )

    cuda_graphs: Literal["auto", "on", "off"] = option(
        "auto",
        "Capture the training step as CUDA graphs: auto captures wherever it is possible (with several processes, where that "
        "is faster than reductions that overlap the backward pass), on refuses to run where it is not. A capture that fails "
        "ends the run.",
        "model",
    )

    train_batch_size: int = option(sd_differs(16, 1), "Samples per process and micro-batch.", "training", ge=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.", "training", ge=1)
    num_train_epochs: int = option(100, "Passes over the data, when --max_train_steps is not given.", "training", ge=1)
    max_train_steps: int | None = option(None, "Optimizer steps in all; overrides --num_train_epochs.", "training", ge=1)
    global_batch_size: int | None = option(
        None,
        "Samples per optimizer step over all processes; as many micro-batches add up as that takes. Instead of "
        "--gradient_accumulation_steps.",
        "training",
        ge=1,
    )
    gradient_accumulation_dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None,
        "Precision in which micro-batches add up. Default: fp32, with --zero_stage 1 the precision of the weights.",
        "training",
    )

    zero_stage: int = option(
        0,
        "DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.",
        "sharding",
        ge=0,
        le=3,
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = option(
        "none",
        "Keep masters, moments and the moving average in host memory, or in files under --nvme_path mapped into it, and step "
        "there.",
        "sharding",
    )
    offload_parameters: bool = option(False, "With --zero_stage 3, keep the sharded weights in host memory.", "sharding")
    nvme_path: str | None = option(None, "Directory on a fast disk for --offload_optimizer nvme.", "sharding")
    deepspeed_config: str | None = option(
        None,
        "JSON file of further DeepSpeed options, merged with the engine's own; what contradicts the other options is refused.",
        "sharding",
    )

    learning_rate: float = option(1e-4, "Learning rate after warm-up.", "optimizer", ge=0)
    scale_lr: bool = option(False, "Multiply the learning rate by accumulation, batch size and processes.", "optimizer")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        option("constant", "Schedule of the learning rate.", "optimizer")
    )
    lr_warmup_steps: int = option(500, "Warm-up in optimizer steps, for the schedules that warm up.", "optimizer", ge=0)
    use_8bit_adam: bool = option(False, "Use the 8-bit AdamW of bitsandbytes.", "optimizer")
    adam_beta1: float = option(0.9, "Decay of AdamW's first moment.", "optimizer", ge=0, lt=1)
    adam_beta2: float = option(0.999, "Decay of AdamW's second moment.", "optimizer", ge=0, lt=1)
    adam_weight_decay: float = option(sd_differs(1e-2, 0.0), "Weight decay.", "optimizer", ge=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", "optimizer", gt=0)
    max_skipped_steps: int = option(
        10, "Stop once so many steps were skipped because a loss or gradient was not finite.", "optimizer", ge=0
    )
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this global norm; 0 leaves them as they are.", "optimizer", ge=0
    )
    use_ema: bool = option(False, "Keep an exponential moving average of the weights, and export it.", "optimizer")
    offload_ema: bool = option(False, "Keep the moving average in host memory between steps.", "optimizer")
    foreach_ema: bool = option(False, "Accepted from the scripts; the moving average is always updated that way.", "optimizer")

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(
        only(("sd",), None), "What the model predicts. Default: as the pretrained scheduler says.", "objective"
    )
    snr_gamma: float | None = option(
        None, "Gamma of the Min-SNR loss weights (arXiv:2303.09556); 5.0 is recommended.", "objective", gt=0
    )
    noise_offset: float = option(
        only(("sd",), 0.0), "Scale of an offset that the noise of a channel shares.", "objective", ge=0
    )
    input_perturbation: float = option(
        only(("sd",), 0.0),
        "Scale of extra noise in the input that the target does not see; 0.1 is recommended.",
        "objective",
        ge=0,
    )
    dream_training: bool = option(
        only(("sd",), False), "Train with DREAM (arXiv:2312.00210): one extra forward pass.", "objective"
    )
    dream_detail_preservation: float = option(only(("sd",), 1.0), "DREAM's detail preservation factor p.", "objective", gt=0)

    allow_tf32: bool = option(False, "Allow TF32 matrix products on Ampere GPUs and newer.", "precision")
    matrix_precision: Literal["fp8"] | None = option(
        only(("kandinsky-prior", "wuerstchen"), None),
        "Precision of the matrix products within the model's blocks, on Hopper GPUs and newer; needs --compile and "
        "--mixed_precision bf16. Default: that of the weights.",
        "precision",
    )
    deterministic: bool = option(
        False, "Repeat a run on the same GPUs bit for bit, with slower convolutions and attention.", "precision"
    )

    logging_dir: str = option("logs", "TensorBoard directory, inside the output directory.", "output")
    report_to: Literal["tensorboard", "wandb", "all", "none"] = option(
        "tensorboard",
        "Where metrics are reported beside metrics.jsonl; all: TensorBoard, and wandb if it is installed.",
        "output",
    )
    tracker_project_name: str = option("text2image-fine-tune", "Project name in the tracker.", "output")
    log_every: int = option(10, "Steps between two lines of metrics; the device is not read in between.", "output", ge=1)
    validation_prompts: list[str] | None = option(None, "Prompts of the validation images.", "output")
    validation_epochs: int = option(5, "Epochs between two rounds of validation images.", "output", ge=1)
    num_validation_images: int = option(1, "Images per validation prompt.", "output", ge=1)
    push_to_hub: bool = option(False, "Upload the trained pipeline to the hub.", "output")
    hub_token: str | None = option(None, "Token for the upload; never logged or stored.", "output")
    hub_model_id: str | None = option(None, "Repository of the upload. Default: the output directory's name.", "output")

    checkpointing_steps: int = option(500, "Steps between two checkpoints.", "checkpoints", ge=1)
    checkpoint_async: bool = option(
        False,
        "Write checkpoints beside the training, which waits only for a copy of its state to host memory.",
        "checkpoints",
    )
    step_timeout: float | None = option(
        None,
        "Seconds after which a step that does not end is given up: the processes that are behind are named, and the exit code "
        "is 75.",
        "checkpoints",
        gt=0,
    )
    checkpoints_total_limit: int | None = option(None, "How many checkpoints to keep. Default: all.", "checkpoints", ge=1)
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint directory, or `latest` for the newest in the output directory.", "checkpoints"
    )
    local_rank: int = option(-1, "Set by launchers; the environment variable LOCAL_RANK wins.", "training")

    @property
    def uses_xformers(self) -> bool:
        """Whether attention is xFormers', by either of its names."""
        return self.attention == "xformers" or self.enable_xformers_memory_efficient_attention


Model = TypeVar("Model", bound=CacheConfig)


def options_by_family(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Name -> defaults by family, for the options that not every family has, or has with one default."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {name: extra["by_family"] for name, extra in extras.items() if isinstance(extra, dict) and extra["by_family"]}  # type: ignore[misc]


def options_lacking(model: type[BaseModel], family: str) -> list[str]:
    """Names of the options that a family does not have."""
    return [name for name, by_family in options_by_family(model).items() if family not in by_family]


def options_of(config: CacheConfig) -> dict[str, Any]:
    """The options that the configuration's family has, with their values."""
    return config.model_dump(exclude=set(options_lacking(type(config), config.family)))


def _argument_name(name: str) -> str:
    return f"--{name}"


def _closest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {matches[0]}?" if matches else "; --help lists all options"


class Parser(argparse.ArgumentParser):
    """Reports mistakes as `UserError` instead of printing the usage."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for argument in get_args(annotation) for choice in _choices(argument)]


def build_parser(model: type[BaseModel], program: str, description: str) -> argparse.ArgumentParser:
    """A parser whose options, groups and help follow the fields of `model`; values stay text for pydantic to judge."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    parser = Parser(
        prog=program,
        usage=f"python -m {program} --family FAMILY [options]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=width),
    )
    parser.add_argument("--config", metavar="FILE.toml", help="Read options from a TOML file; the command line wins.")
    groups: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        title = str(extra["group"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        text = f"{field.description}{_describe_default(field.is_required(), field.default, extra['by_family'])}"
        text = text.replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(_argument_name(name), action=argparse.BooleanOptionalAction, help=text)
        elif get_origin(field.annotation) is not Literal and list[str] in get_args(field.annotation):
            group.add_argument(_argument_name(name), nargs="+", metavar="TEXT", help=text)
        else:
            choices = _choices(field.annotation)
            metavar = "{" + ",".join(choices) + "}" if choices else name.rsplit("_", 1)[-1].upper()
            group.add_argument(_argument_name(name), metavar=metavar, help=text)
    return parser


def _describe_default(required: bool, default: Any, by_family: Any) -> str:
    """What `--help` says after an option's description: which families have it, and its default."""
    if required:
        return " (required)"
    if by_family is None:
        return "" if default in (None, False) else f" (default: {default})"
    families_of: dict[str, list[str]] = {}
    for family, value in by_family.items():
        families_of.setdefault("required" if value is REQUIRED else str(value), []).append(family)
    if families_of.keys() <= {"None", "False"}:
        return f" ({', '.join(by_family)} only)"
    return " (" + "; ".join(f"{', '.join(families)}: {value}" for value, families in families_of.items()) + ")"


def _read_toml(path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML: {error}") from None
    for name in values:
        if name not in names:
            raise UserError(f"--config {path}: unknown option {name}{_closest(name, names)}")
    return values


def _explain(error: ValidationError) -> str:
    """One line that names every option pydantic refused."""
    parts = []
    for item in error.errors():
        name = _argument_name(str(item["loc"][0])) if item["loc"] else ""
        if item["type"] == "missing":
            parts.append(f"{name} is required")
        else:
            parts.append(f"{name} {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(dict.fromkeys(parts))


def parse(model: type[Model], program: str, description: str, arguments: Sequence[str]) -> Model:
    """Reads the command line and the TOML file it may name.

    Raises:
        UserError: an unknown option, a bad value or a missing one, named with the remedy.
    """
    parser = build_parser(model, program, description)
    names = list(model.model_fields)
    namespace, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        unknown_name = unknown[0].split("=", 1)[0]
        if not unknown_name.startswith("-"):
            raise UserError(f"unexpected argument {unknown_name!r}; quote values that hold spaces")
        raise UserError(f"unknown option {unknown_name}{_closest(unknown_name, [_argument_name(n) for n in names])}")
    given = vars(namespace)
    file = given.pop("config", None)
    values = (_read_toml(Path(file), names) if file else {}) | given
    family = values.get("family")
    # An unknown family is pydantic's to refuse.
    lacking = [name for name in options_lacking(model, family) if name in values] if family in FAMILIES else []
    if lacking:
        raise UserError(f"{', '.join(map(_argument_name, lacking))} is not used by {family}; leave it out")
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    _check(config)
    return config


def _check(config: CacheConfig) -> None:
    """Mistakes that only a look at several options, or at the disk, can find."""
    for name, by_family in options_by_family(type(config)).items():
        if by_family.get(config.family) is REQUIRED and getattr(config, name) is None:
            raise UserError(f"--{name} is required")
    if not (config.dataset_name or config.train_data_dir or config.shards_dir):
        raise UserError("no data: give --train_data_dir, --dataset_name, or --shards_dir with shards built before")
    if config.train_data_dir and not Path(config.train_data_dir).is_dir():
        raise UserError(f"--train_data_dir {config.train_data_dir}: no such directory")
    lacking = options_lacking(type(config), config.family)
    for name in PIPELINE_OPTIONS:
        if name not in lacking:
            _check_pipeline(name, Path(getattr(config, name)))
    output = Path(config.output_dir)
    directories = {"--output_dir": output, "--shards_dir": config.shards_path}
    if isinstance(config, TrainConfig) and config.compile_cache_dir:
        directories["--compile_cache_dir"] = Path(config.compile_cache_dir)
    for flag, path in directories.items():
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise UserError(f"{flag} {path}: {existing} is a file; name a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {path}: no permission to write in {existing}")
    if not isinstance(config, TrainConfig):
        return
    if config.report_to in ("wandb", "all") and config.hub_token:
        raise UserError("--hub_token with --report_to wandb would expose the token; log in with `hf auth login` instead")
    for flag, wanted, package in (
        ("--report_to wandb", config.report_to == "wandb", "wandb"),
        ("--use_8bit_adam", config.use_8bit_adam, "bitsandbytes"),
        ("--matrix_precision fp8", config.matrix_precision == "fp8", "torchao"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs {package}, which is not installed: install the extra `{package}`")
    if config.global_batch_size and config.gradient_accumulation_steps != 1:
        raise UserError("--global_batch_size and --gradient_accumulation_steps exclude each other; leave one out")
    if (config.offload_optimizer == "nvme") != (config.nvme_path is not None):
        raise UserError("--offload_optimizer nvme and --nvme_path need each other")
    if config.compile and config.zero_stage == 3:
        raise UserError("--compile with --zero_stage 3: weights are gathered from Python around every module; leave one out")
    if config.offload_parameters and config.zero_stage != 3:
        raise UserError("--offload_parameters needs --zero_stage 3")
    weights_precision = "fp32" if config.mixed_precision == "no" else config.mixed_precision
    if config.gradient_accumulation_dtype not in (None, "fp32", weights_precision):
        raise UserError(
            f"--gradient_accumulation_dtype {config.gradient_accumulation_dtype} with --mixed_precision "
            f"{config.mixed_precision}: gradients add up in fp32 or in the precision of the weights"
        )
    if config.zero_stage == 1 and config.mixed_precision != "no" and config.gradient_accumulation_dtype == "fp32":
        raise UserError("--zero_stage 1 adds gradients up in the precision of the weights; for fp32 use --zero_stage 2")
    if config.deepspeed_config and not Path(config.deepspeed_config).is_file():
        raise UserError(f"--deepspeed_config {config.deepspeed_config}: no such file")
    if config.matrix_precision == "fp8" and not (config.compile and config.mixed_precision == "bf16"):
        raise UserError("--matrix_precision fp8 needs --compile, which fuses the casts, and --mixed_precision bf16")
    if config.matrix_precision == "fp8" and config.train_batch_size % 16:
        raise UserError(
            f"--matrix_precision fp8: such products need a --train_batch_size in multiples of 16, not {config.train_batch_size}"
        )
    if config.attention == "xformers" and config.family not in XFORMERS:
        raise UserError(f"--attention xformers is not used by {config.family}; leave it out")
    if config.enable_xformers_memory_efficient_attention and config.attention not in ("auto", "xformers"):
        raise UserError(
            f"--enable_xformers_memory_efficient_attention contradicts --attention {config.attention}; leave one out"
        )
    if config.deterministic and (config.uses_xformers or config.attention == "cudnn"):
        used = "xformers" if config.uses_xformers else "cudnn"
        raise UserError(f"--deterministic: the attention of {used} does not repeat its gradients; leave one out")
    for name in ("compile_cache_dir", "compile_mode"):
        if not config.compile and getattr(config, name) not in (None, "default"):
            raise UserError(f"--{name} needs --compile")
    if config.offload_ema and not config.use_ema:
        raise UserError("--offload_ema needs --use_ema")
    resume = config.resume_from_checkpoint
    if resume and resume != "latest" and not (Path(resume).is_dir() or (output / Path(resume).name).is_dir()):
        raise UserError(f"--resume_from_checkpoint {resume}: no such directory; give one, or `latest`")


def _check_pipeline(option: str, path: Path) -> None:
    """Refuses what is clearly meant to be a directory but holds no pipeline; anything else may be a name on the hub."""
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or str(path).startswith(".")):
        raise UserError(f"--{option} {path}: no such directory")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"--{option} {path}: no model_index.json there; give a diffusers pipeline")


def to_toml(config: CacheConfig) -> str:
    """The resolved configuration as TOML, without secrets; options that are not set, or not the family's, are left out."""
    values = {name: value for name, value in options_of(config).items() if value is not None and name not in SECRETS}
    return tomli_w.dumps(values)


def local_rank(config: TrainConfig) -> int:
    """Which of its node's processes this one is: LOCAL_RANK where a launcher set it, else --local_rank, else 0."""
    return int(os.environ.get("LOCAL_RANK", max(config.local_rank, 0)))
