"""DreamBooth: an instance and its class in turn, each with a term of the loss; missing images of the class are drawn."""

import json
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from engine.config.command_line import load
from engine.config.mixture import data_sets_of
from engine.config.options import TrainConfig
from engine.data import class_images
from engine.data.samples.order import records_of, seed_of_stream
from engine.data.sources import open_source
from engine.errors import UserError
from engine.files import lock, unlock
from engine.loop.trainer import divide_global_batch, train
from engine.models import stable_diffusion
from engine.models.family import open_family
from engine.processes import Processes
from engine.shards import build_command
from tests import objectives, reference, tiny
from tests.commands import ON_GPU, run_two
from tests.loop.runs import SLACK, checkpoint_tensors, command, published_order, relative_distance

STEPS, BATCH, SEED = 20, 2, 2**40 + 9
INSTANCE, CLASS = "sks dog", "a dog"


def images_of(directory: Path, count: int, size: tuple[int, int] = (16, 16)) -> Path:
    """Images and nothing else."""
    (tiny.write_images(directory, count, size) / "metadata.jsonl").unlink()
    return directory


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Three images of the instance, five of the class, and shards of both once they are built."""
    place = tmp_path_factory.mktemp("dreambooth")
    folders = {"instance_data_dir": place / "instance", "class_data_dir": place / "class"}
    for (name, folder), count in zip(folders.items(), (3, 5), strict=True):
        images_of(folder, count)
        if name == "class_data_dir":  # other pictures than those of the instance
            for path in folder.iterdir():
                Image.open(path).transpose(Image.Transpose.ROTATE_90).point(lambda value: 255 - value).save(path)
    return {name: str(folder) for name, folder in folders.items()} | {"shards_dir": str(place / "shards")}


@pytest.fixture(scope="module")
def settings(model, folders):
    """A run over both, with prior preservation."""

    def make(output: Path, **options) -> TrainConfig:
        values = {
            "family": "sd", "pretrained_model_name_or_path": str(model), "output_dir": str(output), "resolution": 16,
            "instance_prompt": INSTANCE, "with_prior_preservation": True, "class_prompt": CLASS, "num_class_images": 5,
            "train_batch_size": BATCH, "max_train_steps": 4, "seed": SEED, "learning_rate": 1e-3, "log_every": 1,
            "report_to": "none", "use_ema": True, "deterministic": ON_GPU,
        }  # fmt: skip
        return load(TrainConfig, {name: value for name, value in (values | folders | options).items() if value is not None})

    return make


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def reference_run(model, config: TrainConfig) -> tuple[dict, dict, list[tuple[float, float, float]]]:
    """Weights, averages and losses (the sum and its terms) of an independent loop, with the loss as the script computes it."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").train()
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    scheduler.register_to_config(prediction_type=config.prediction_type)
    text_encoder, tokenizer = (
        CLIPTextModel.from_pretrained(model, subfolder="text_encoder"),
        CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
    )
    data = [reference.PlainShards(Path(config.shards_dir) / name) for name in ("instance", "class")]
    with torch.no_grad():
        most = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        tokens = tokenizer([INSTANCE, CLASS], return_tensors="pt", **most)
        states = text_encoder(tokens.input_ids, return_dict=False)[0]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    rates = get_scheduler("constant", optimizer)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    losses, accumulation = [], config.gradient_accumulation_steps
    count = scheduler.config.num_train_timesteps
    for step in range(config.max_train_steps):
        summed = torch.zeros(3, dtype=torch.double)
        for part in range(accumulation):
            batches = []
            for of, shards in enumerate(data):
                turn = step * accumulation + part
                slots = list(range((2 * turn + of) * BATCH, (2 * turn + of + 1) * BATCH))
                own = torch.arange(turn * BATCH, (turn + 1) * BATCH)
                records = records_of(seed_of_stream(SEED, of), own, len(shards.images)).tolist()
                latents, noise, _ = reference.batch(shards, records, slots, SEED)
                timesteps = objectives.timesteps(config, SEED, slots, 2 * BATCH * accumulation, count)
                batches.append((latents, noise, timesteps, states[of].expand(BATCH, -1, -1)))
            # As collate_fn has it: the instance's samples, then as many of the class.
            latents, noise, timesteps, conditions = (torch.cat(each) for each in zip(*batches, strict=True))
            epsilon = config.prediction_type == "epsilon"
            target = noise if epsilon else scheduler.get_velocity(latents, noise, timesteps)
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, conditions, return_dict=False)[0]
            (ours, prior), (wanted, wanted_prior) = prediction.chunk(2), target.chunk(2)
            prior_loss = F.mse_loss(prior, wanted_prior)
            errors = F.mse_loss(ours, wanted, reduction="none").mean([1, 2, 3])
            if config.snr_gamma is not None:
                snr = compute_snr(scheduler, timesteps.chunk(2)[0])
                errors = errors * snr.clamp(max=config.snr_gamma) / (snr if epsilon else snr + 1)
            loss = errors.mean() + config.prior_loss_weight * prior_loss
            (loss / accumulation).backward()
            summed += torch.stack([loss, errors.mean(), prior_loss]).detach().double() / accumulation
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(tuple(summed.tolist()))
    weights = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    return weights, dict(zip(weights, ema.shadow_params, strict=True)), losses


@pytest.mark.parametrize(
    "case",
    [
        {"prediction_type": "epsilon", "snr_gamma": 5.0, "gradient_accumulation_steps": 2, "prior_loss_weight": 0.5},
        {"prediction_type": "v_prediction", "snr_gamma": 5.0, "zero_stage": 2, "max_train_steps": 5},
    ],
    ids=str,
)
def test_weights_averages_and_both_terms_follow_the_script(case, settings, model, tmp_path, record_property):
    config = settings(tmp_path / "out", **({"max_train_steps": STEPS} | case))
    assert train(config) == 0
    weights, averages, losses = reference_run(model, config)
    start = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    for kind, expected in (("weight", weights), ("ema", averages)):
        ours = published_order(start, checkpoint_tensors(tmp_path / "out" / f"checkpoint-{config.max_train_steps}", kind))
        distance = relative_distance(ours, expected, dict(start.named_parameters()))
        record_property(kind, distance)
        assert distance < 1e-4 * SLACK
    logged = [[line[name] for name in ("loss", "loss/instance", "loss/class")] for line in lines(tmp_path / "out")]
    for ours, expected in zip(logged, losses, strict=True):
        assert ours == pytest.approx(expected, rel=1e-4 * SLACK)


def bits(output: Path, step: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: checkpoint_tensors(output / f"checkpoint-{step}", kind) for kind in ("weight", "exp_avg", "ema")}


def assert_same(left: Path, right: Path, step: int = 4) -> None:
    for (kind, ours), theirs in zip(bits(left, step).items(), bits(right, step).values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The output directory of a run of four steps, with pictures after every second one."""
    output = tmp_path_factory.mktemp("whole") / "out"
    drawn = {"validation_prompts": ["sks dog"], "num_validation_images": 1, "validation_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stable_diffusion._PREVIEW_STEPS, "dreambooth", 2)
        assert train(settings(output, checkpointing_steps=2, **drawn)) == 0
    return output


@pytest.mark.parametrize(("wanted", "accumulated"), [(8, 1), (16, 2), (12, None)])
def test_the_global_batch_is_of_both(wanted, accumulated, settings, tmp_path):
    config = settings(tmp_path, global_batch_size=wanted)
    if accumulated:
        assert divide_global_batch(config, 2).gradient_accumulation_steps == accumulated
    else:
        with pytest.raises(UserError, match="2 of the instance and of the class; the nearest that can: 8 or 16"):
            divide_global_batch(config, 2)


def test_pictures_come_every_so_many_steps_and_none_if_none_are_asked_for(whole, settings, tmp_path):
    assert sorted(path.name for path in (whole / "samples").iterdir()) == ["step-2.png", "step-4.png"]
    none = {"validation_prompts": ["sks dog"], "num_validation_images": 0, "validation_steps": 1, "max_train_steps": 1}
    assert train(settings(tmp_path / "out", **none)) == 0
    assert not (tmp_path / "out" / "samples").exists()


def test_what_resumes_goes_on_in_the_same_turns(whole, settings, tmp_path):
    checkpoint = str(whole / "checkpoint-2")
    assert train(settings(tmp_path / "out", resume_from_checkpoint=checkpoint)) == 0
    assert_same(tmp_path / "out", whole)
    assert [line["loss"] for line in lines(tmp_path / "out")] == [line["loss"] for line in lines(whole)[2:]]
    alone = {"with_prior_preservation": False, "class_data_dir": None, "class_prompt": None}
    with pytest.raises(UserError, match="checkpoint-2: was written with --with_prior_preservation; give it"):
        train(settings(tmp_path / "other", resume_from_checkpoint=checkpoint, gradient_accumulation_steps=2, **alone))


def test_shards_alone_train_the_same(whole, settings, folders, tmp_path):
    alone = dict.fromkeys(("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt"))
    assert train(settings(tmp_path / "out", max_train_steps=2, **alone)) == 0
    assert_same(tmp_path / "out", whole, step=2)


def test_an_epoch_is_of_as_many_of_each_as_the_larger_has(settings, tmp_path):
    assert train(settings(tmp_path / "out", max_train_steps=None, num_train_epochs=2, train_batch_size=5)) == 0
    assert lines(tmp_path / "out")[-1]["step"] == 2  # of the five images of the class, five at a time
    assert lines(tmp_path / "out")[-1]["epoch"] == 2.0


def test_nothing_of_the_class_is_held_out(settings, tmp_path, capsys):
    held = {"validation_fraction": 0.4, "validation_timesteps": 2, "max_train_steps": 1}
    assert train(settings(tmp_path / "out", **held)) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "state.json").read_text())
    assert [stream["records"] for stream in state["streams"]] == [2, 5]
    assert "the loss over 1 records" in capsys.readouterr().err


@pytest.fixture(scope="module")
def quickly():
    """Draws in two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_images, "Wanted", partial(class_images.Wanted, steps=2))
        yield


@pytest.fixture(scope="module")
def drawn(model, quickly, tmp_path_factory) -> Path:
    """Three images of the class beside one that was there, and the shards of all."""
    place = tmp_path_factory.mktemp("drawn")
    images_of(place / "class", 1)
    assert build_command([
        "--family", "sd", "--pretrained_model_name_or_path", str(model), "--resolution", "16", "--seed", str(SEED),
        "--instance_data_dir", str(images_of(place / "instance", 2)), "--instance_prompt", INSTANCE,
        "--with_prior_preservation", "--class_data_dir", str(place / "class"), "--class_prompt", CLASS,
        "--num_class_images", "4", "--sample_batch_size", "2", "--shards_dir", str(place / "shards"),
    ]) == 0  # fmt: skip
    return place


def over(place: Path, **options) -> dict:
    folders = {"instance_data_dir": "instance", "class_data_dir": "class", "shards_dir": "shards"}
    return {name: str(place / folder) for name, folder in folders.items()} | {
        "num_class_images": 4, "sample_batch_size": 2, "max_train_steps": 1,
    } | options  # fmt: skip


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("drawn-*.png")}


def test_missing_images_of_the_class_are_drawn_and_no_others(drawn, settings, tmp_path, monkeypatch):
    before = pictures(drawn / "class")
    assert sorted(before) == ["drawn-00000.png", "drawn-00001.png", "drawn-00002.png"]
    assert len(set(before.values())) == 3
    (drawn / "class" / "drawn-00001.png").unlink()  # as of a run that was killed, whose other process was further
    config = settings(tmp_path / "out", **over(drawn))
    class_images.draw_class_images(config, open_family(config).encoding, Processes().connect())
    assert pictures(drawn / "class") == before
    monkeypatch.setattr(class_images, "_open", lambda *unused: pytest.fail("nothing is missing"))
    assert train(config) == 0


def test_more_images_of_the_class_are_drawn_and_its_shards_grow(drawn, settings, tmp_path):
    place = tmp_path / "grown"
    shutil.copytree(drawn, place)
    assert train(settings(tmp_path / "out", **over(place))) == 0
    before, more = (
        pictures(place / "class"),
        over(place, num_class_images=6, max_train_steps=2, resume_from_checkpoint="latest"),
    )
    with pytest.raises(UserError, match="was trained on other samples.*give --shards_dir .*/shards .*--continue_on_grown_data"):
        train(settings(tmp_path / "out", **more))
    assert pictures(place / "class") == before
    assert train(settings(tmp_path / "out", continue_on_grown_data=True, **more)) == 0
    after = pictures(place / "class")
    assert after.items() > before.items()
    assert len(after) == 5


def missing(config: TrainConfig) -> list[int]:
    with ExitStack() as stack:
        return class_images._missing_once_held(config, stack, None)


def test_what_is_no_data_keeps_none_from_being_drawn(settings, tmp_path):
    folder = tmp_path / "class"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in (".gitkeep", "notes.txt", "drawn-00000.png.0123abcd.partial"):
        (folder / name).touch()
    config = settings(tmp_path / "out", class_data_dir=str(folder))
    assert missing(config) == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in folder.iterdir()) == [".gitkeep", ".ipynb_checkpoints", "empty", "notes.txt"]
    assert missing(config.model_copy(update={"max_train_samples": 2})) == [0, 1]


def test_a_run_takes_what_another_draws_meanwhile(drawn, settings, tmp_path, monkeypatch):
    folder = tmp_path / "class"
    folder.mkdir()
    descriptor = lock(folder)

    def end(seconds: float) -> None:
        shutil.copytree(drawn / "class", folder, dirs_exist_ok=True)
        unlock(descriptor, folder)

    monkeypatch.setattr(class_images, "time", SimpleNamespace(sleep=end))
    assert missing(settings(tmp_path / "out", **over(drawn, class_data_dir=str(folder)))) == []


def test_images_of_the_class_need_no_masks(drawn, settings, tmp_path):
    instance, of_class = data_sets_of(settings(tmp_path / "out", **over(drawn, mask_column="mask")))
    assert len(open_source(of_class.config)) == 4
    with pytest.raises(UserError, match="no masks there"):
        open_source(instance.config)


class OneOfTwo:
    """A process beside another that is not there: what the first computes is given."""

    world, device = 2, torch.device("cpu")

    def __init__(self, rank: int, missing: list[int]) -> None:
        self.rank, self.is_first, self.told = rank, rank == 0, iter([missing])

    def computed_by_first(self, work):
        return next(self.told, None)

    def first_before_others(self, work):
        return work()

    all_or_none = first_before_others


def test_two_processes_draw_what_one_does(drawn, settings, tmp_path, monkeypatch):
    config = settings(tmp_path / "out", **over(drawn, class_data_dir=str(tmp_path / "class")))
    (tmp_path / "class").mkdir()
    for rank, of_it in ((1, ["drawn-00002.png"]), (0, ["drawn-00000.png", "drawn-00001.png"])):
        before = pictures(tmp_path / "class")
        class_images.draw_class_images(config, open_family(config).encoding, OneOfTwo(rank, [0, 1, 2]))
        assert sorted(pictures(tmp_path / "class").keys() - before) == of_it
    assert pictures(tmp_path / "class") == pictures(drawn / "class")
    monkeypatch.setattr(class_images, "_open", lambda *unused: pytest.fail("the other one draws"))
    class_images.draw_class_images(config, open_family(config).encoding, OneOfTwo(1, [0]))


@pytest.mark.two_processes
def test_two_processes_train_as_one(whole, settings, tmp_path):
    run_two(command(settings(tmp_path / "pair", train_batch_size=1)))
    # The same global batch, of units of one sample here too.
    assert train(settings(tmp_path / "one", train_batch_size=1, gradient_accumulation_steps=2)) == 0
    start = UNet2DConditionModel.from_pretrained(settings(tmp_path).pretrained_model_name_or_path, subfolder="unet")
    for kind in ("weight", "ema"):
        one, pair = (published_order(start, bits(tmp_path / name)[kind]) for name in ("one", "pair"))
        assert relative_distance(pair, one, dict(start.named_parameters())) < 1e-4 * SLACK


def test_a_table_has_a_caption_of_all_and_its_losses_a_weight(whole, settings, folders, tmp_path, capsys):
    def tables(weight: float) -> list[dict]:
        images = {"instance": (INSTANCE, 1.0), "class": (CLASS, weight)}
        return [
            {"name": name, "train_data_dir": folders[f"{name}_data_dir"], "prompt": prompt, "loss_weight": of}
            for name, (prompt, of) in images.items()
        ]

    alone = dict.fromkeys(("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt", "with_prior_preservation"))
    usual = alone | {"image_interpolation_mode": "bilinear", "checkpointing_steps": 4}  # as the shards were built
    assert train(settings(tmp_path / "out", data_sets=tables(0.25), **usual)) == 0
    for line in lines(tmp_path / "out"):
        (loss,) = [
            line[name] * weight for name, weight in (("loss/instance", 1.0), ("loss/class", 0.25)) if line[name] is not None
        ]
        assert line["loss"] == pytest.approx(loss, rel=1e-6)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "state.json").read_text())
    assert [stream.get("loss_weight") for stream in state["streams"]] == [None, 0.25]
    assert "in_turn" not in state
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    assert (
        train(settings(tmp_path / "on", data_sets=tables(0.5), resume_from_checkpoint=checkpoint, max_train_steps=5, **usual))
        == 0
    )
    assert "Changed since checkpoint-4: loss_weight 0.5 of class (was 0.25)" in capsys.readouterr().err
