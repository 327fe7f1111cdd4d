"""The image encoder of Wuerstchen against two references that share no code with it: one written here, and torchvision."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from engine.models.efficientnet import EfficientNetEncoder, load_encoder, read_weights
from tests import torchvision_reference

# Table 4 of arXiv:2104.00298 and torchvision's numbering: stage, fused, expansion, stride, input and output channels, layers.
STAGES = [
    (1, True, 1, 1, 24, 24, 2), (2, True, 4, 2, 24, 48, 4), (3, True, 4, 2, 48, 64, 4),
    (4, False, 4, 2, 64, 128, 6), (5, False, 6, 1, 128, 160, 9), (6, False, 6, 2, 160, 256, 15),
]  # fmt: skip


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole state dict as torchvision writes them, listed from the table alone."""
    shapes: dict[str, tuple[int, ...]] = {}

    def normalisation(name: str, channels: int) -> None:
        shapes.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def layer(name: str, inputs: int, outputs: int, kernel: int, depthwise: bool = False) -> None:
        shapes[f"{name}.0.weight"] = (outputs, 1 if depthwise else inputs, kernel, kernel)
        normalisation(f"{name}.1", outputs)

    layer("backbone.0", 3, 24, 3)
    for stage, fused, expansion, _, first_inputs, outputs, layers in STAGES:
        for number in range(layers):
            inputs = first_inputs if number == 0 else outputs
            wide, block = inputs * expansion, f"backbone.{stage}.{number}.block"
            if fused and expansion == 1:
                layer(f"{block}.0", inputs, outputs, 3)
            elif fused:
                layer(f"{block}.0", inputs, wide, 3)
                layer(f"{block}.1", wide, outputs, 1)
            else:
                layer(f"{block}.0", inputs, wide, 1)
                layer(f"{block}.1", wide, wide, 3, depthwise=True)
                squeezed = inputs // 4
                shapes |= {f"{block}.2.fc1.weight": (squeezed, wide, 1, 1), f"{block}.2.fc1.bias": (squeezed,)}
                shapes |= {f"{block}.2.fc2.weight": (wide, squeezed, 1, 1), f"{block}.2.fc2.bias": (wide,)}
                layer(f"{block}.3", wide, outputs, 1)
    layer("backbone.7", 256, 1280, 1)
    shapes["mapper.0.weight"] = (16, 1280, 1, 1)
    normalisation("mapper.1", 16)
    return shapes


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A synthetic state dict in torchvision's naming that keeps activations near unit size."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in expected_shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        elif len(shape) == 1:
            state[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator) * (1.0 / (shape[1] * shape[2] * shape[3])) ** 0.5
    return state


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))


def reference_forward(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The forward pass as functions of the state dict's names."""

    def layer(x, name, kernel, stride=1, depthwise=False, act=True):
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=(kernel - 1) // 2, groups=weight.shape[0] if depthwise else 1)
        x = normalise(x, f"{name}.1", 1e-3)
        return x * torch.sigmoid(x) if act else x

    def normalise(x, name, eps):
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + eps).sqrt()
        return (x - state[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]

    x = layer(pixels, "backbone.0", 3, stride=2)
    for stage, fused, expansion, first_stride, first_inputs, outputs, layers in STAGES:
        for number in range(layers):
            block = f"backbone.{stage}.{number}.block"
            stride = first_stride if number == 0 else 1
            if fused and expansion == 1:
                y = layer(x, f"{block}.0", 3, stride)
            elif fused:
                y = layer(layer(x, f"{block}.0", 3, stride), f"{block}.1", 1, act=False)
            else:
                y = layer(layer(x, f"{block}.0", 1), f"{block}.1", 3, stride, depthwise=True)
                squeezed = F.conv2d(F.adaptive_avg_pool2d(y, 1), state[f"{block}.2.fc1.weight"], state[f"{block}.2.fc1.bias"])
                squeezed = squeezed * torch.sigmoid(squeezed)
                gate = F.conv2d(squeezed, state[f"{block}.2.fc2.weight"], state[f"{block}.2.fc2.bias"])
                y = layer(y * torch.sigmoid(gate), f"{block}.3", 1, act=False)
            keeps_shape = stride == 1 and (first_inputs if number == 0 else outputs) == outputs
            x = x + y if keeps_shape else y
    return normalise(F.conv2d(layer(x, "backbone.7", 1), state["mapper.0.weight"]), "mapper.1", 1e-5)


def test_names_shapes_and_count_follow_the_table():
    encoder = EfficientNetEncoder()
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == expected_shapes()
    learned = ("weight", "bias")
    listed = sum(
        torch.Size(shape).numel() for name, shape in expected_shapes().items()
        if name.startswith("backbone.") and name.endswith(learned)
    )  # fmt: skip
    assert listed == sum(parameter.numel() for parameter in encoder.backbone.parameters()) == 20_177_488


def test_the_forward_pass_follows_the_reference(weights, pixels):
    latents = load_encoder(weights)(pixels)
    expected = reference_forward({name: tensor.double() for name, tensor in weights.items()}, pixels.double())
    assert latents.shape == (2, 16, 3, 2)
    assert 0.1 < expected.std() < 100
    torch.testing.assert_close(latents.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torchvision_reference.available(), reason="torchvision is not installed (the Makefile puts it aside)")
def test_the_forward_pass_follows_torchvision(weights, pixels, tmp_path):
    save_file(weights, tmp_path / "effnet.safetensors")
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    torchvision_reference.run(tmp_path)
    results = load_file(tmp_path / "results.safetensors")
    assert int(results["parameters"]) == 20_177_488
    torch.testing.assert_close(load_encoder(weights)(pixels), results["latents"], rtol=1e-5, atol=1e-5)


def test_a_stage_b_checkpoint_and_its_safetensors_are_the_same(weights, tmp_path):
    # What the published file holds beside the encoder must not matter.
    torch.save({"state_dict": {"x": torch.zeros(3)}, "effnet_state_dict": weights, "step": 5}, tmp_path / "model_v2_stage_b.pt")
    save_file(weights, tmp_path / "effnet.safetensors")
    for name in ("model_v2_stage_b.pt", "effnet.safetensors"):
        read = read_weights(str(tmp_path / name), None)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], weights[key]) for key in weights)


class Dangerous:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"effnet_state_dict": Dangerous()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="model.pt: holds programs beside tensors, and is not run"):
        read_weights(str(tmp_path / "model.pt"), None)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_something_else_are_refused(change, weights):
    state = dict(weights)
    if change == "missing":
        del state["backbone.3.1.block.0.0.weight"]
    elif change == "extra":
        state["backbone.8.weight"] = torch.zeros(1)
    else:
        state["backbone.0.0.weight"] = torch.zeros(24, 4, 3, 3)
    with pytest.raises(UserError, match="not an EfficientNet-V2-S encoder: .*backbone"):
        load_encoder(state)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("absent.pt", None, "no such file"),
        ("broken.safetensors", b"not a file", "truncated or damaged"),
        ("broken.pt", b"not a file", "truncated or damaged"),
        ("other.pt", {"state_dict": {}}, "holds no effnet_state_dict"),
    ],
)
def test_other_files_are_named(name, content, named, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=named) as error:
        read_weights(str(path), None)
    assert name in str(error.value)


def test_a_repository_that_cannot_be_reached_is_named():
    with pytest.raises(
        UserError, match="--pretrained_image_encoder_name_or_path nobody/nothing: neither a file nor on the hub"
    ):
        read_weights("nobody/nothing", None)
