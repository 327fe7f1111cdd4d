"""Masks beside images: where they are found, that they follow their images, and what is trained under them."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from engine.config.command_line import load
from engine.config.options import CacheConfig, TrainConfig
from engine.data.describe import contact_sheet
from engine.data.format.index import Index
from engine.data.sources import open_source
from engine.data.sources.decode import decode_mask
from engine.errors import UserError
from engine.loop.trainer import train
from engine.models.encoder import open_encoding
from engine.shards import build_command
from tests import reference
from tests.data.test_shards import arguments, build, contents
from tests.loop.runs import checkpoint_tensors
from tests.loop.runs import config as run_config
from tests.models.test_families import RESOLUTION

SIZE = (40, 24)


def half(size: tuple[int, int] = SIZE) -> Image.Image:
    """A mask that is white on the left and black on the right."""
    return Image.fromarray(np.repeat([[255] * (size[0] // 2) + [0] * (size[0] - size[0] // 2)], size[1], 0).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(images, tmp_path) -> Path:
    """The images of the tests, all but the last with a mask; that of the second is grey, the others' half white."""
    folder = Path(shutil.copytree(images, tmp_path / "masked"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "masks").mkdir()
    for number, row in enumerate(rows[:-1]):
        row["mask"] = f"masks/{number}.png"
        (Image.new("L", (16, 16), 51) if number == 1 else half((16, 16))).save(folder / row["mask"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def source_of(folder: Path, **options):
    values = {"family": "sd", "train_data_dir": str(folder), "mask_column": "mask"} | options
    return open_source(CacheConfig.model_validate(values))


def test_a_table_names_masks_and_no_mask_is_a_sample(folder):
    source = source_of(folder)
    assert len(source) == 12
    assert source.mask(0) == (folder / "masks" / "0.png").read_bytes()
    assert source.mask(11) is None
    with pytest.raises(UserError, match="--mask_column weight: no masks there; name them in that column"):
        source_of(folder, mask_column="weight")


def test_masks_lie_beside_images_that_no_table_names(tmp_path, capsys):
    for name in ("a", "b", "c"):
        Image.new("RGB", SIZE).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    half().save(tmp_path / "a-masklabel.png")
    half().save(tmp_path / "b-masklabel.jpg")
    source = source_of(tmp_path, mask_column="masklabel")
    assert [source.name(number) for number in range(len(source))] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [source.mask(number) is None for number in range(3)] == [False, False, True]
    assert "1 images have no mask and are trained whole" in capsys.readouterr().err
    with pytest.raises(UserError, match="leave them beside the images as IMAGE-mask.png"):
        source_of(tmp_path)


@pytest.mark.parametrize("written", ["gone.png", "https://there/mask.png", 7])
def test_a_mask_that_is_not_there_refuses_its_sample(written, folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["mask"] = written
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "mask" in source_of(folder).refusal(0).reason


@pytest.mark.parametrize("kind", ["image", "bytes"])
def test_rows_of_parquet_hold_masks(kind, tmp_path):
    images = [png(Image.new("RGB", SIZE, (number, 0, 0))) for number in range(3)]
    masks = [png(half()), None, png(half())]
    if kind == "image":
        images, masks = ([value and {"bytes": value, "path": None} for value in column] for column in (images, masks))
    table = pa.table({"image": images, "mask": masks, "text": ["a", "b", "c"]})
    if kind == "image":
        features = {"info": {"features": {"image": {"_type": "Image"}, "mask": {"_type": "Image"},
                                          "text": {"dtype": "string", "_type": "Value"}}}}  # fmt: skip
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    source = source_of(tmp_path)
    for _ in range(2):
        assert [source.mask(number) for number in range(3)] == [png(half()), None, png(half())]
    assert source.noticed == {"no mask, trained whole": 1}
    with pytest.raises(UserError, match="--mask_column other: not a column of"):
        source_of(tmp_path, mask_column="other")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd", {"random_flip": True, "random_crops": 3}),
        ("sd", {"center_crop": True, "image_interpolation_mode": "nearest"}),
        ("kandinsky-decoder", {}),
        ("wuerstchen", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("image_size", [SIZE, (97, 300)], ids=str)
def test_a_mask_is_cropped_and_flipped_as_its_image(family, options, image_size, model, published):
    """An image that looks like its mask still does after its preparation."""
    models = {"pretrained_model_name_or_path": str(model)} if family == "sd" else published(family)
    given = {"family": family, "resolution": RESOLUTION.get(family, 32), "mask_column": "mask", **models, **options}
    encoding = open_encoding(CacheConfig.model_validate(given))
    if family == "sd":
        encoding = encoding.of_size(48, 32)
    mask = half(image_size)
    variants, masks = encoding.prepare(mask.convert("RGB"), 5), encoding.prepare_mask(mask, 5)
    assert len(variants) == len(masks)
    for variant, of_it in zip(variants, masks, strict=True):
        field = encoding.mask_fields["mask"]
        assert (of_it["mask"].shape, of_it["mask"].dtype) == (field.shape, field.dtype)
        pixels = variant["pixels"][:1]
        shown = torch.nn.functional.adaptive_avg_pool2d(pixels, field.shape[1:])
        # Resampling blurs an image by some pixels, and dark and bright are those of the family's normalisation.
        shown = (shown - shown.min()) / (shown.max() - shown.min())
        assert (shown - of_it["mask"] / 255).abs().max() < 0.35
        assert (shown - of_it["mask"] / 255).abs().mean() < 0.05
    assert (encoding.prepare_mask(Image.new("L", image_size, 255), 5)[0]["mask"] == 255).all()


def test_masks_are_grey_upright_and_of_the_size_of_their_image():
    turned = half().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(buffer := io.BytesIO(), "JPEG", quality=100, exif=exif)
    assert decode_mask(buffer.getvalue(), SIZE).tobytes() == half().tobytes()
    assert decode_mask(png(half((20, 12))), SIZE).tobytes() == half().tobytes()
    deep = Image.fromarray(np.asarray(half()).astype(np.uint16) * 257)
    assert decode_mask(png(deep), SIZE).tobytes() == half().tobytes()
    assert decode_mask(png(half().convert("1")), SIZE).mode == "L"
    with pytest.raises(Exception, match="not of its image's ratio: 24 x 24, and the image 40 x 24"):
        decode_mask(png(half((24, 24))), SIZE)


def test_shards_hold_masks_and_a_changed_one_is_encoded_again(model, folder, tmp_path, capsys):
    shards = tmp_path / "shards"
    masked = ("--mask_column", "mask", "--random_flip")
    index = build(model, folder, shards, *masked)
    assert index.fields["mask"].shape == (1, 8, 8)
    plain = reference.PlainShards(shards)
    rows = [[variant["mask"] for variant in plain.images[number]] for number in range(12)]
    left = torch.tensor([[[255] * 4 + [0] * 4] * 8], dtype=torch.uint8)
    assert torch.equal(torch.as_tensor(rows[0][0]), left)
    assert torch.equal(torch.as_tensor(rows[0][1]), left.flip(-1))
    assert (torch.as_tensor(rows[1][0]) == 51).all()
    assert (torch.as_tensor(rows[11][0]) == 255).all()
    before = contents(shards)
    Image.new("L", (16, 16), 102).save(folder / "masks" / "3.png")
    build(model, folder, shards, *masked)
    assert contents(shards).items() > before.items()
    found = [variant["mask"] for variants in reference.PlainShards(shards).images for variant in variants]
    assert sum(bool((torch.as_tensor(mask) == 102).all()) for mask in found) == 2
    config = CacheConfig.model_validate(Index.read(shards).config)
    sheet = contact_sheet(shards, {"": Index.read(shards)}, open_encoding(config), 4)
    assert np.asarray(sheet).std() > 5
    with pytest.raises(UserError, match="--mask_column mask, now None"):
        build(model, folder, shards, "--random_flip")
    assert "1 images have no mask and are trained whole" in capsys.readouterr().err


def test_buckets_hold_masks_of_their_sizes(model, tmp_path):
    folder, shards = tmp_path / "images", tmp_path / "shards"
    folder.mkdir()
    for number, size in enumerate([(32, 32), (64, 16)] * 2):
        Image.new("RGB", size).save(folder / f"{number}.png")
        half(size).save(folder / f"{number}-mask.png")
        (folder / f"{number}.txt").write_text("a caption")
    assert build_command(arguments(model, folder, shards, "--mask_column", "mask", "--buckets", "16x16", "32x8")) == 0
    for bucket, (height, width) in {"16x16": (8, 8), "32x8": (4, 16)}.items():
        data = reference.PlainShards(shards / bucket)
        expected = torch.tensor([255] * (width // 2) + [0] * (width // 2), dtype=torch.uint8).expand(1, height, width)
        assert [torch.equal(torch.as_tensor(row["mask"]), expected) for (row,) in data.images] == [True, True]


def test_an_unreadable_mask_refuses_its_sample(model, folder, tmp_path):
    (folder / "masks" / "2.png").write_bytes(b"no image")
    index = build(model, folder, tmp_path / "shards", "--mask_column", "mask")
    ((reason, refusals),) = index.refused.items()
    assert reason.startswith("mask: ")
    assert refusals.first[0]["source"] == "002.png"


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_white_is_as_no_mask_and_black_is_not_trained(model, images, folder, tmp_path):
    def run(name: str, data: Path, **options) -> list[float]:
        shared = {"max_train_steps": 3, "checkpointing_steps": 3, "dream_training": True, "adam_weight_decay": 0.0}
        assert train(run_config(model, data, tmp_path / f"{name}-shards", tmp_path / name, **(shared | options))) == 0
        return losses(tmp_path / name)

    bare = run("bare", images)
    half_white = run("half", folder, mask_column="mask")
    for name, level in (("white", 255), ("black", 0)):
        for mask in (folder / "masks").iterdir():
            Image.new("L", (16, 16), level).save(mask)
        if name == "black":
            Image.new("L", (16, 16), level).save(folder / "masks" / "11.png")
            text = (folder / "metadata.jsonl").read_text()
            (folder / "metadata.jsonl").write_text(text[:-1] + ', "mask": "masks/11.png"}')
        assert run(name, folder, mask_column="mask") == (bare if name == "white" else [0, 0, 0])
    assert all(0 < part < whole for part, whole in zip(half_white, bare, strict=True))
    weights = {name: checkpoint_tensors(tmp_path / name / "checkpoint-3", "weight") for name in ("bare", "white")}
    assert all(torch.equal(weights["white"][name], weights["bare"][name]) for name in weights["bare"])


@pytest.mark.parametrize("family", ["kandinsky-decoder", "wuerstchen"])
def test_families_train_under_masks(family, published, folder, tmp_path):
    common = {"family": family, **published(family), "resolution": RESOLUTION[family], "train_data_dir": str(folder)}
    values = {"mask_column": "mask", "output_dir": str(tmp_path / "out"), "max_train_steps": 2, "train_batch_size": 4}
    assert train(TrainConfig.model_validate({**common, **values, "log_every": 1, "report_to": "none", "seed": 1})) == 0
    assert all(loss > 0 for loss in losses(tmp_path / "out"))


def test_the_prior_which_has_no_positions_refuses_masks():
    with pytest.raises(UserError, match="mask_column"):
        load(TrainConfig, {"family": "kandinsky-prior", "mask_column": "mask", "train_data_dir": "images"}, "config.toml")


def test_shards_without_masks_do_not_train_with_them(model, images, shards, tmp_path):
    run = run_config(model, images, shards, tmp_path / "out", mask_column="mask")
    run.train_data_dir = None
    with pytest.raises(UserError, match="--mask_column None, now mask"):
        train(run)
