"""Mistakes that only a look at several options can find, and those that only a look at this machine can."""

import codecs
import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engine.catalogue import INDEX, LORA_WEIGHTS, MODEL, PEFT_CONFIG, PIPELINES
from engine.config.mixture import DataSet, data_sets_of
from engine.config.optimizers import OPTIMIZERS, named
from engine.config.options import CAPTIONED, OFFSET, SPATIAL, XFORMERS, CacheConfig, TrainConfig
from engine.config.schema import REQUIRED, default_of, options_by_family, options_lacking, options_under
from engine.errors import UserError
from engine.storage import is_remote, shown

LARGEST = 2**31 - 1  # of the integer options but seeds, so that sums and products of them are integers everywhere

NEEDS_BLOCKS = "--shuffle_window needs --shuffle blocks"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")


def check_options(config: CacheConfig) -> None:
    """Refuses options that contradict or need each other, wherever the configuration is read.

    Raises:
        UserError: which, and the remedy.
    """
    for name, by_family in options_by_family(type(config)).items():
        if by_family.get(config.family) is REQUIRED and getattr(config, name) is None:
            raise UserError(f"--{name} is required")
    for name, value in config:
        if type(value) is int and value > LARGEST and name not in ("seed", "subset_seed"):
            raise UserError(f"--{name} {value}: too large; {LARGEST} is the most")
    _check_dreambooth(config)
    for data_set in data_sets_of(config):
        with _of(data_set):
            _check_data(data_set.config)
            _check_captions(data_set.config)
            if config.family in SPATIAL:
                _check_buckets(data_set.config)
    _check_apart(data_sets_of(config))
    if isinstance(config, TrainConfig):
        _check_text_encoder(config)
        _check_reading(config)
        _check_held_out(config)
        _check_outputs(config)
        _check_objective(config)
        _check_rates(config)
        _check_adapters(config)
        _check_optimizer(config)
        _check_sharding(config)
        _check_precision(config)
        _check_attention(config)


def _check_dreambooth(config: CacheConfig) -> None:
    if config.instance_prompt is not None and config.instance_data_dir is None:
        raise UserError("--instance_prompt needs --instance_data_dir; in a [[data]] table it is `prompt`")
    if not config.is_dreambooth:
        return
    beside = next((name for name in ("train_data_dir", "dataset_name") if getattr(config, name)), None)
    if beside:
        raise UserError(f"--{beside} beside DreamBooth's data sets; give its folder as --instance_data_dir, or leave it out")
    if config.data_sets is not None:
        raise UserError("[[data]] tables beside DreamBooth's data sets; give tables alone, with `prompt` and `loss_weight`")
    if config.instance_data_dir is None:
        if config.class_data_dir or not config.shards_dir:
            raise UserError("--with_prior_preservation needs --instance_data_dir, or --shards_dir with shards built before")
        return
    needed = ["instance_prompt"] * (config.family in CAPTIONED)
    if config.with_prior_preservation:
        needed += ["class_data_dir", *["class_prompt"] * (config.family in CAPTIONED)]
    for name in needed:
        if getattr(config, name) is None:
            of = "--instance_data_dir" if name == "instance_prompt" else "--with_prior_preservation"
            raise UserError(f"{of} needs --{name}")
    if config.with_prior_preservation and config.class_data_dir:
        instance, of_class = (Path(place).resolve() for place in (config.instance_data_dir, config.class_data_dir))
        if instance.is_relative_to(of_class):
            raise UserError(f"--class_data_dir {config.class_data_dir}: holds the instance; give a folder of its own")
        if of_class.is_relative_to(instance):
            raise UserError(
                f"--class_data_dir {config.class_data_dir}: lies in --instance_data_dir, whose folders are all read; give a "
                "folder beside it"
            )


@contextlib.contextmanager
def _of(data_set: DataSet) -> Iterator[None]:
    """Says of which data set a mistake is, where there are several."""
    try:
        yield
    except UserError as error:
        error.lines = [f"{data_set.title}{line}" for line in error.lines]
        raise


def _check_data(config: CacheConfig) -> None:
    try:
        _ = config.background_color
    except ValueError:
        raise UserError(f"--background {config.background}: give none, white, black or R,G,B, each of 0 to 255") from None
    try:
        b"".decode(config.metadata_encoding)
        codecs.lookup(config.metadata_encoding)  # which the line before leaves out
    except (LookupError, ValueError):
        raise UserError(
            f"--metadata_encoding {config.metadata_encoding}: unknown; give for example utf-8, cp1252, shift_jis or gb18030"
        ) from None


def _check_apart(data_sets: list[DataSet]) -> None:
    """Refuses data sets of which one would be built where another's shards are."""
    at: dict[str, DataSet] = {}
    for data_set in data_sets:
        other = at.setdefault(data_set.config.shards_address or str(data_set.config.shards_path.resolve()), data_set)
        if other is not data_set and (other.config.source or data_set.config.source):
            raise UserError(f"[[data]]: {other.name} and {data_set.name} have the same shards_dir; give each its own")


def _check_captions(config: CacheConfig) -> None:
    if config.pre_compute_text_embeddings and config.cache_text == "tokens":
        raise UserError("--pre_compute_text_embeddings with captions as tokens, which the step encodes; leave it out")
    for template in config.caption_template or ():
        if "{caption}" not in template:
            raise UserError(f"--caption_template {template!r}: does not say where the caption stands; write {{caption}} there")
    if config.keep_tokens and not config.shuffle_tags:
        raise UserError("--keep_tokens needs --shuffle_tags")
    if config.caption_variants and not config.varies_captions:
        raise UserError("--caption_variants needs --shuffle_tags or several texts of --caption_template")
    if config.varies_captions and config.cache_text == "states" and config.caption_variants is None:
        what = "--shuffle_tags" if config.shuffle_tags else "--caption_template with several texts"
        raise UserError(
            f"{what} needs --cache_text tokens, or --caption_variants with the number of texts that are encoded of each caption"
        )


def _check_buckets(config: CacheConfig) -> None:
    given = [name for name in ("bucket_step", "bucket_area", "bucket_max_ratio") if _is_given(config, name)]
    if given and config.buckets is not True:
        why = (
            "needs --buckets" if not config.buckets else "shapes sizes that --buckets makes, and it is given some; leave it out"
        )
        raise UserError(f"--{given[0]} {why}")
    if isinstance(config.buckets, list):
        twice = next((size for size in config.buckets if config.buckets.count(size) > 1), None)
        if twice:
            raise UserError(f"--buckets {twice}: stands there twice")
    elif config.buckets and (config.bucket_area or config.resolution**2) < config.bucket_step**2:
        said = f"bucket_area {config.bucket_area}" if config.bucket_area else f"resolution {config.resolution}"
        raise UserError(
            f"--{said}: no size in steps of --bucket_step {config.bucket_step} has so few pixels; give a smaller step"
        )


def _is_given(config: CacheConfig, name: str) -> bool:
    """Whether an option has another value than the family's default."""
    return bool(getattr(config, name) != default_of(type(config), name, config.family, config.recipe))


def _check_text_encoder(config: TrainConfig) -> None:
    if config.joins_text_encoder and config.cache_text == "states":
        option = "train_text_encoder" if config.train_text_encoder else "placeholder_token"
        raise UserError(
            f"--{option}: what --cache_text states keeps was made by a text encoder that stays as it is; leave it out"
        )
    if (config.placeholder_token is None) != (config.initializer_token is None):
        raise UserError("--placeholder_token and --initializer_token need each other")
    if config.num_vectors > 1 and config.placeholder_token is None:
        raise UserError("--num_vectors needs --placeholder_token")
    for name in ("lora_rank", "train_text_encoder", "freeze"):
        if config.placeholder_token is not None and getattr(config, name):
            raise UserError(f"--placeholder_token trains the vectors of a token alone; leave out --{name}")
    if config.text_encoder_lr is not None and not config.train_text_encoder:
        raise UserError("--text_encoder_lr needs --train_text_encoder")


def _check_reading(config: TrainConfig) -> None:
    address = next(filter(None, (data_set.config.shards_address for data_set in data_sets_of(config))), None)
    unsaid = not (config.shuffle or address or config.resume_from_checkpoint)  # which may each mean blocks
    if config.shuffle_window and (config.shuffle == "global" or unsaid):
        raise UserError(NEEDS_BLOCKS)
    if config.shards_cache and not address:
        raise UserError(
            "--shards_cache keeps shards of remote storage; give the address of some as --shards_dir, or leave it out"
        )
    if config.shards_cache_limit and not config.shards_cache:
        raise UserError("--shards_cache_limit needs --shards_cache")
    try:
        _ = config.cache_bytes
    except ValueError:
        raise UserError(f"--shards_cache_limit {config.shards_cache_limit}: give a size, for example 500GB or 2TiB") from None
    if address and shown(address).endswith("/index.json"):
        raise UserError(f"--shards_dir {shown(address)}: is a file; give the address of its directory")
    if address and config.verify_shards == "all":
        raise UserError("--verify_shards all would read every shard over the network; rows, the default, compares what is read")
    if address and config.report_to in ("wandb", "all") and shown(address) != address.rstrip("/"):
        raise UserError("--shards_dir with a password or token and --report_to wandb would expose it; give another --report_to")


def _check_held_out(config: TrainConfig) -> None:
    if config.validation_fraction and config.validation_data_dir:
        raise UserError("--validation_fraction and --validation_data_dir exclude each other; leave one out")
    if config.resume_from_checkpoint is None:  # else it may be of a run that held a fraction out
        check_judged_by_loss(config)


def check_judged_by_loss(config: TrainConfig) -> None:
    """Refuses what goes by a held-out loss where there is none."""
    for name in ("best_checkpoint", "patience"):
        if getattr(config, name) and not (config.validation_fraction or config.validation_data_dir):
            raise UserError(f"--{name} goes by the held-out loss; give --validation_fraction or --validation_data_dir")


def _check_outputs(config: TrainConfig) -> None:
    if config.report_to in ("wandb", "all") and config.hub_token:
        raise UserError("--hub_token with --report_to wandb would expose the token; log in with `hf auth login` instead")
    if config.overwrite and config.resume_from_checkpoint in ("latest", "best"):
        named = config.resume_from_checkpoint
        raise UserError(f"--overwrite removes what --resume_from_checkpoint {named} goes on with; leave one out")
    if config.continue_on_grown_data and not config.resume_from_checkpoint:
        raise UserError("--continue_on_grown_data needs --resume_from_checkpoint")
    for name in ("compile_cache_dir", "compile_mode"):
        if not config.compile and getattr(config, name) not in (None, "default"):
            raise UserError(f"--{name} needs --compile")
    if config.offload_ema and not config.use_ema:
        raise UserError("--offload_ema needs --use_ema")


# Options that mean something beside certain values of another only.
_NEEDS: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "logit_mean": ("timestep_sampling", ("logit_normal",)),
    "logit_std": ("timestep_sampling", ("logit_normal",)),
    "mode_scale": ("timestep_sampling", ("mode",)),
    "timestep_bias_multiplier": ("timestep_bias_strategy", ("earlier", "later", "range")),
    "timestep_bias_portion": ("timestep_bias_strategy", ("earlier", "later")),
    "timestep_bias_begin": ("timestep_bias_strategy", ("range",)),
    "timestep_bias_end": ("timestep_bias_strategy", ("range",)),
    "snr_gamma": ("loss_weighting", (None, "min_snr", "soft_min_snr")),
    "p2_gamma": ("loss_weighting", ("p2",)),
    "p2_k": ("loss_weighting", ("p2",)),
    "edm_sigma_data": ("loss_weighting", ("edm",)),
    "huber_c": ("loss_type", ("huber", "smooth_l1")),
    "lr_num_cycles": ("lr_scheduler", ("cosine_with_restarts",)),
    "lr_power": ("lr_scheduler", ("polynomial",)),
    "huber_schedule": ("loss_type", ("huber", "smooth_l1")),
}


def _check_objective(config: TrainConfig) -> None:
    if _is_given(config, "pyramid_noise_iterations") and not config.pyramid_noise_discount:
        raise UserError("--pyramid_noise_iterations needs --pyramid_noise_discount, for example 0.3")
    if config.offset_noise and config.noise_offset != OFFSET:
        raise UserError(f"--offset_noise contradicts --noise_offset {config.noise_offset:g}; leave one out")
    for name, (other, values) in _NEEDS.items():
        if _is_given(config, name) and getattr(config, other) not in values:
            raise UserError(f"--{name} needs --{other} {' or '.join(filter(None, values))}")


def _check_rates(config: TrainConfig) -> None:
    for given in config.lr_of or ():
        pattern, _, rate = given.rpartition("=")
        try:
            known = bool(pattern.strip()) and 0 <= float(rate) < math.inf
        except ValueError:
            known = False
        if not known:
            raise UserError(f"--lr_of {given}: give PATTERN=RATE, for example down_blocks.0=1e-5")
    if config.freeze and config.lora_rank:
        raise UserError("--freeze with --lora_rank: adapters alone are trained; --lora_targets says which layers have one")
    if "" in map(str.strip, config.freeze or ()):
        raise UserError("--freeze: a pattern is empty; give names of weights, for example down_blocks.0")


def _check_adapters(config: TrainConfig) -> None:
    given = [name for name in options_under(TrainConfig, "adapters") if name != "lora_rank" and _is_given(config, name)]
    if given and not config.lora_rank:
        raise UserError(f"--{given[0]} needs --lora_rank, with which adapters are trained")
    for name in ("lora_alpha", "lora_targets"):
        if config.lora_weights and name in given:
            raise UserError(f"--{name} with --lora_weights, which says it itself; leave one out")
    base, run = config.base_precision, config.mixed_precision
    if base and (run == "no" or (base == "bf16" and run != "bf16")):
        needed = "bf16" if base == "bf16" else "bf16 or fp16"
        raise UserError(f"--base_precision {base} needs --mixed_precision {needed}, in which its products are computed")
    if base not in (None, "bf16") and config.zero_stage == 3:
        raise UserError(f"--base_precision {base} with --zero_stage 3, which divides weights and no codes; use --zero_stage 2")
    if config.use_dora and config.zero_stage == 3:
        raise UserError("--use_dora with --zero_stage 3, which has no layer's weights outside of it; use --zero_stage 2")
    if config.lora_rank and config.matrix_precision:
        raise UserError("--matrix_precision fp8 with --lora_rank, whose weights are frozen; leave one out")


def _check_optimizer(config: TrainConfig) -> None:
    name = config.optimizer
    if config.use_8bit_adam != (name == "adamw8bit"):
        raise UserError(f"--{'' if config.use_8bit_adam else 'no-'}use_8bit_adam contradicts --optimizer {name}; leave one out")
    if OPTIMIZERS[name].averages_itself and config.use_ema:
        raise UserError(f"--use_ema with --optimizer {name}, which keeps an average of its own; leave one out")
    if name == "schedulefree_adamw" and config.adam_beta1 == 0:
        raise UserError("--adam_beta1 0 with --optimizer schedulefree_adamw, whose mixture of weights it is; give more, as 0.9")
    if name == "prodigy" and (config.layer_lr_decay < 1 or any(rate for _, rate in config.rates_of_patterns)):
        raise UserError(
            "--optimizer prodigy finds one rate for all weights; leave out --layer_lr_decay, --text_encoder_lr and --lr_of, "
            "but for rates of 0"
        )
    if config.masters == "none" and not OPTIMIZERS[name].without_masters:
        able = named(lambda traits: traits.without_masters)
        raise UserError(f"--masters none is for --optimizer {able}, not {name}; leave it out")
    if config.masters == "none" and config.mixed_precision != "bf16":
        raise UserError("--masters none needs --mixed_precision bf16")


def _check_sharding(config: TrainConfig) -> None:
    if config.gradient_noise_scale and config.zero_stage == 3:
        raise UserError("--gradient_noise_scale with --zero_stage 3, which never has a whole gradient; use --zero_stage 2")
    if config.gradient_noise_scale and config.mixed_precision == "fp16":
        raise UserError("--gradient_noise_scale with --mixed_precision fp16, whose loss scale changes; use bf16 or no")
    if config.gradient_noise_scale and config.timestep_sampling == "stratified":
        raise UserError(
            "--gradient_noise_scale with --timestep_sampling stratified, where a sample's noise is less the larger the batch; "
            "leave one out"
        )
    if config.global_batch_size and config.gradient_accumulation_steps != 1:
        raise UserError("--global_batch_size and --gradient_accumulation_steps exclude each other; leave one out")
    if (config.offload_optimizer == "nvme") != (config.nvme_path is not None):
        raise UserError("--offload_optimizer nvme and --nvme_path need each other")
    if config.compile and config.zero_stage == 3:
        raise UserError("--compile with --zero_stage 3: weights are gathered from Python around every module; leave one out")
    if config.offload_parameters and config.zero_stage != 3:
        raise UserError("--offload_parameters needs --zero_stage 3")


def _check_precision(config: TrainConfig) -> None:
    if config.accumulation_precision not in ("fp32", config.weights_precision):
        raise UserError(
            f"--gradient_accumulation_dtype {config.gradient_accumulation_dtype} with --mixed_precision "
            f"{config.mixed_precision}: gradients add up in fp32 or in the precision of the weights"
        )
    if config.zero_stage == 1 and config.accumulation_precision != config.weights_precision:
        raise UserError("--zero_stage 1 adds gradients up in the precision of the weights; for fp32 use --zero_stage 2")
    if config.matrix_precision == "fp8" and not (config.compile and config.mixed_precision == "bf16"):
        raise UserError("--matrix_precision fp8 needs --compile, which fuses the casts, and --mixed_precision bf16")
    if config.matrix_precision == "fp8" and config.train_batch_size % 16:
        raise UserError(
            f"--matrix_precision fp8: such products need a --train_batch_size in multiples of 16, not {config.train_batch_size}"
        )


def _check_attention(config: TrainConfig) -> None:
    if config.attention == "xformers" and config.family not in XFORMERS:
        raise UserError(f"--attention xformers is not used by {config.family}; leave it out")
    if config.enable_xformers_memory_efficient_attention and config.attention not in ("auto", "xformers"):
        raise UserError(
            f"--enable_xformers_memory_efficient_attention contradicts --attention {config.attention}; leave one out"
        )
    if config.deterministic and (config.uses_xformers or config.attention == "cudnn"):
        used = "xformers" if config.uses_xformers else "cudnn"
        raise UserError(f"--deterministic: the attention of {used} does not repeat its gradients; leave one out")


def check_machine(config: CacheConfig) -> None:
    """Refuses work without data, or with what is not on this machine's disk or not installed, before anything is opened.

    Raises:
        UserError: which, and the remedy.
    """
    data_sets = data_sets_of(config)
    if not isinstance(config, TrainConfig) and any(data_set.config.source for data_set in data_sets):
        data_sets = [data_set for data_set in data_sets if data_set.config.source]  # nothing is built of others
    for data_set in data_sets:
        if config.is_dreambooth:
            _check_folder(config, data_set)
        else:
            with _of(data_set):
                _check_source(data_set.config)
    lacking = options_lacking(type(config), config.family)
    for name in PIPELINES:
        if name not in lacking:
            _check_pipeline(name, Path(getattr(config, name)))
    check_writable("--output_dir", Path(config.output_dir))
    for data_set in data_sets:
        with _of(data_set):
            _check_shards(data_set.config)
    if isinstance(config, TrainConfig):
        _check_training_machine(config)


def _check_folder(config: CacheConfig, data_set: DataSet) -> None:
    """Refuses a folder of DreamBooth that is not there; that of the class is made."""
    folder = data_set.config.source
    if folder and config.shards_address:
        raise UserError(_read_there(config))
    if folder and not data_set.prior and not Path(folder).exists():
        raise UserError(f"--instance_data_dir {folder}: no such directory")


def _read_there(config: CacheConfig) -> str:
    return (
        f"--shards_dir {config.shards_place}: shards are read there, and not built; build them in a directory of this "
        "machine, and copy that there; to train on those that are there, leave the data set out"
    )


def _check_source(config: CacheConfig) -> None:
    """Refuses a data set that is not there."""
    if not (config.source or config.shards_dir):
        raise UserError("no data: give --train_data_dir, --dataset_name, or --shards_dir with shards built before")
    if config.shards_address and (config.source or not isinstance(config, TrainConfig)):
        raise UserError(_read_there(config))
    if config.train_data_dir and not config.dataset_name and not Path(config.train_data_dir).exists():
        raise UserError(f"--train_data_dir {config.train_data_dir}: no such directory")
    name = config.dataset_name
    if name and not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--dataset_name {name}: no such directory or file")


def _check_shards(config: CacheConfig) -> None:
    """Refuses shards that can neither be read nor written."""
    if not (config.source or config.shards_address):
        _check_shards_are_there(config.shards_path)
    if not config.shards_address and not holds_shards(config.shards_path):  # nothing is written beside shards that are there
        check_writable("--shards_dir", config.shards_path)


def _check_training_machine(config: TrainConfig) -> None:
    held_out = config.validation_data_dir
    if held_out and not is_remote(held_out) and not Path(held_out).exists():
        raise UserError(f"--validation_data_dir {held_out}: no such directory")
    places = {"--compile_cache_dir": config.compile_cache_dir, "--nvme_path": config.nvme_path}
    for flag, place in (places | {"--shards_cache": config.shards_cache}).items():
        if place:
            check_writable(flag, Path(place))
    if config.report_to in ("tensorboard", "all"):
        logs = Path(config.logging_dir)
        if leads_out(logs):
            raise UserError(f"--logging_dir {logs}: leads out of the output directory; name a folder in it, for example logs")
        check_writable("--logging_dir", Path(config.output_dir) / logs)
    known = OPTIMIZERS[config.optimizer]
    optimizer_flag = "--use_8bit_adam" if config.use_8bit_adam else f"--optimizer {config.optimizer}"
    for flag, wanted, package in (
        ("--report_to wandb", config.report_to == "wandb", "wandb"),
        (optimizer_flag, known.package is not None, known.package or ""),
        ("--matrix_precision fp8", config.matrix_precision == "fp8", "torchao"),
        ("--base_precision nf4", config.base_precision == "nf4", "bitsandbytes"),
    ):
        if wanted and not installed(package):
            extra = "optimizers" if package in ("prodigyopt", "schedulefree") else package
            raise UserError(f"{flag} needs {package}, which is not installed: install the extra `{extra}`")
    if config.lora_weights and not config.resume_from_checkpoint and not Path(config.lora_weights).exists():
        raise UserError(f"--lora_weights {config.lora_weights}: no such file or folder")
    if config.deepspeed_config and not Path(config.deepspeed_config).is_file():
        raise UserError(f"--deepspeed_config {config.deepspeed_config}: no such file")
    resume = config.resume_from_checkpoint
    if (
        resume
        and resume not in ("latest", "best")
        and not (Path(resume).is_dir() or (Path(config.output_dir) / Path(resume).name).is_dir())
    ):
        raise UserError(f"--resume_from_checkpoint {resume}: no such directory; give one, `latest` or `best`")


def leads_out(folder: Path) -> bool:
    """Whether a folder that is to be inside another is not."""
    return folder.is_absolute() or ".." in folder.parts


def installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name in the working directory, as wandb leaves one, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _check_shards_are_there(directory: Path) -> None:
    if directory.is_file():
        raise UserError(f"--shards_dir {directory}: is a file; name the directory of the shards")
    if not directory.is_dir():
        address = ":" in directory.parts[0]  # with a slash too few, or without a scheme
        remedy = "an address begins with https://, s3:// or the like" if address else "name the directory of the shards"
        raise UserError(f"--shards_dir {directory}: no such directory; {remedy}")


def holds_shards(directory: Path) -> bool:
    """Whether there are shards, of one size or several."""
    try:
        return any((directory / name).is_file() for name in ("index.json", "buckets.json"))
    except OSError:  # a name that is too long, say
        return False


def check_writable(flag: str, path: Path) -> None:
    """Refuses a directory that cannot be made, or not be written in, by trying in the nearest one that exists.

    Raises:
        UserError: why.
    """
    try:
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise UserError(f"{flag} {path}: {existing} is a file; name a directory")
        tempfile.TemporaryDirectory(prefix=".", dir=existing).cleanup()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}; name another directory", passing=True) from None


def check_picture(flag: str, path: Path) -> None:
    """Refuses a path where no PNG can be written."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{flag} {path}: pictures are written as PNG; give a name that ends in .png")
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a directory; name a file")
    check_writable(flag, path.parent)


def _check_pipeline(option: str, path: Path) -> None:
    """Refuses what is clearly meant to be a directory but holds no pipeline; anything else may be a name on the hub."""
    if str(path).startswith(("http:", "https:")):
        raise UserError(f"--{option}: an address; download the file and give its path, or name a repository on the hub")
    if not path.exists() and path.suffix in SINGLE_FILES:
        raise UserError(f"--{option} {path}: no such file")
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or str(path).startswith(".")):
        raise UserError(f"--{option} {path}: no such directory")
    if path.is_file() and path.suffix not in SINGLE_FILES:
        raise UserError(f"--{option} {path}: no file of weights; single files are {', '.join(SINGLE_FILES)}")
    if path.is_file() and option != MODEL:
        raise UserError(f"--{option} {path}: a file; give a diffusers pipeline (single files: --family sd only)")
    if path.is_dir() and not (path / INDEX).is_file():
        raise UserError(f"--{option} {path}: no {INDEX} there; {_closest_pipeline(path)}")


def _closest_pipeline(path: Path) -> str:
    """What to give in the place of a directory that is no pipeline."""
    below = next((index.parent for depth in ("*", "*/*") for index in sorted(path.glob(f"{depth}/{INDEX}"))), None)
    if below:
        return f"give {below}"
    if (path.parent / INDEX).is_file():
        return f"this is a part; give the pipeline, {path.parent}"
    if any((path / name).is_file() for name in (PEFT_CONFIG, LORA_WEIGHTS)):
        return "it holds an adapter (LoRA), no model; give the pipeline that it belongs to, and this with --lora_weights"
    files = sorted(file for file in path.iterdir() if file.suffix in SINGLE_FILES)
    return f"give a diffusers pipeline, or a single file: {files[0]}" if files else "give a diffusers pipeline"
