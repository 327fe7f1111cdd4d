"""Names and defaults of the options are those of the scripts, and each family has its own."""

import tomllib

import pytest

from engine.config import schema
from engine.config.command_line import parse, to_toml
from engine.config.options import TrainConfig, recipe_in
from engine.config.schema import default_of
from engine.errors import UserError
from tests.config.arguments import run

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
    "pretrained_model_name_or_path": "x", "revision": "x", "non_ema_revision": "x", "center_crop": None,
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
    config = parse(TrainConfig, "engine.run", "", ["--family", family, *data, "--seed", "3", "--output_dir", str(tmp_path)])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert not LACKING[family].keys() & tomllib.loads(file.read_text()).keys()
    assert parse(TrainConfig, "engine.run", "", ["--config", str(file)]) == config


KANDINSKY_LORA = {"output_dir": "kandi_2_2-model-finetuned-lora", "num_validation_images": 4, "validation_epochs": 1}
# What the recipes change of the scripts' flags above, as the LoRA and DreamBooth scripts have it.
RECIPES = {
    "lora": {
        "sd": {"output_dir": "sd-model-finetuned-lora", "num_validation_images": 4, "validation_epochs": 1},
        "kandinsky-prior": KANDINSKY_LORA,
        "kandinsky-decoder": KANDINSKY_LORA,
        "wuerstchen": {"output_dir": "wuerstchen-model-finetuned-lora", "num_validation_images": 1, "validation_epochs": 5},
    },
    "dreambooth": {
        "sd": {
            "output_dir": "dreambooth-model", "num_validation_images": 4, "train_batch_size": 4, "num_train_epochs": 1,
            "learning_rate": 5e-6, "image_interpolation_mode": "bilinear", "validation_epochs": None, "validation_steps": 100,
            "validation_scheduler": "DPMSolverMultistepScheduler",
        },
        "wuerstchen": {
            "output_dir": "dreambooth-model", "train_batch_size": 1, "num_train_epochs": 1, "learning_rate": 5e-6,
            "validation_epochs": None, "validation_steps": 100,
        },
    },
    "dreambooth_lora": {
        "sd": {
            "output_dir": "lora-dreambooth-model", "num_validation_images": 4, "train_batch_size": 4, "num_train_epochs": 1,
            "learning_rate": 5e-4, "image_interpolation_mode": "lanczos", "validation_epochs": 50,
            "validation_scheduler": "DPMSolverMultistepScheduler",
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "family"), [(recipe, family) for recipe, families in RECIPES.items() for family in families]
)
def test_recipes_have_the_defaults_of_their_scripts(recipe, family):
    expected = RECIPES[recipe][family]
    usual = {name: value for name, value in SCRIPT.items() if name not in LACKING[family]} | OTHER_SCRIPTS.get(family, {})
    for name, value in (usual | expected).items():
        assert default_of(TrainConfig, name, family, recipe) == value


# The flags of the LoRA and DreamBooth scripts beside those above, and what is no option here.
ALSO_OF_THE_SCRIPTS = {
    "tokenizer_name", "instance_data_dir", "class_data_dir", "instance_prompt", "class_prompt",
    "with_prior_preservation", "prior_loss_weight", "num_class_images", "train_text_encoder", "sample_batch_size",
    "lr_num_cycles", "lr_power", "validation_prompt", "num_validation_images", "validation_steps",
    "prior_generation_precision", "set_grads_to_none", "offset_noise", "pre_compute_text_embeddings",
    "validation_scheduler", "rank", "lora_dropout",
}  # fmt: skip
OF_OTHER_MODELS = (
    "tokenizer_max_length", "text_encoder_use_attention_mask", "skip_save_text_encoder", "validation_images",
    "class_labels_conditioning",
)  # fmt: skip


def test_every_flag_of_the_lora_and_dreambooth_scripts_is_an_option_or_answered(data):
    known = TrainConfig.model_fields.keys() | schema.options_by_alias(TrainConfig).keys()
    assert not ALSO_OF_THE_SCRIPTS - known
    for name in OF_OTHER_MODELS:
        with pytest.raises(UserError, match=f"unknown option --{name}: (?!.*did you mean|.*--help)"):
            run(*data, f"--{name}", "x")


def test_what_scripts_call_otherwise_means_the_same(data):
    assert run(*data, "--offset_noise").noise_offset == 0.1
    accepted = run(*data, "--set_grads_to_none", "--pre_compute_text_embeddings", "--num_validation_images", "0")
    assert not accepted.draws_images
    for given, said in (
        (["--offset_noise", "--noise_offset", "0.3"], "--offset_noise contradicts --noise_offset 0.3"),
        (["--pre_compute_text_embeddings", "--cache_text", "tokens"], "--pre_compute_text_embeddings with captions as tokens"),
        (["--lr_power", "2"], "--lr_power needs --lr_scheduler polynomial"),
    ):
        with pytest.raises(UserError, match=said):
            run(*data, *given)


def test_a_recipe_is_what_its_own_option_says():
    given = {"lora_rank": 4, "instance_data_dir": "dogs"}
    assert recipe_in({}) == ""
    assert recipe_in(given) == "dreambooth_lora"
    assert [recipe_in({name: value}) for name, value in given.items()] == ["lora", "dreambooth"]
    assert set(RECIPES) == set(schema.RECIPES)


def test_another_name_of_an_option_is_the_option(data, tmp_path):
    (tmp_path / "run.toml").write_text('validation_prompt = "a dog"')
    assert run(*data, "--config", str(tmp_path / "run.toml")).validation_prompts == ["a dog"]
    assert run(*data, "--validation_prompt", "a photo of a dog").validation_prompts == ["a photo of a dog"]


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as leave:
        parse(TrainConfig, "engine.run", "Train.", ["--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    for group in ("model:", "data:", "training:", "optimizer:", "objective:", "output:", "checkpoints:"):
        assert f"\n{group}\n" in text
    for name in SCRIPT:
        assert f"--{name}" in text
