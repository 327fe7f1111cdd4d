"""What torchvision makes of images and weights, for tests to compare with. Run as a command, because transformers behaves
differently in a process where torchvision can be imported.

`python -m tests.torchvision_reference DIRECTORY` reads from the directory:
    images/*.png          RGB photographs; each is prepared at the sizes below with the scripts' transforms
    effnet.safetensors    an image encoder's weights, loaded strictly; and pixels.safetensors, what to encode
and writes results.safetensors beside them.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

SIZES = (64, 128)
# Where the Makefile puts torchvision, apart from the other packages.
REFERENCE = Path(sys.prefix) / "reference"
# torchvision's compiled library is built for CUDA; without it, importing the package fails at operators nobody calls here.
OPERATORS = ("nms", "qnms")


def available() -> bool:
    return (REFERENCE / "torchvision").is_dir() or importlib.util.find_spec("torchvision") is not None


def run(directory: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REFERENCE), str(Path.cwd())])}
    command = [sys.executable, "-m", "tests.torchvision_reference", str(directory)]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def main(directory: Path) -> None:
    from PIL import Image
    from safetensors.torch import load_file, save_file

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS if REFERENCE.is_dir() else ():
        library.define(f"{name}(Tensor x) -> Tensor")
    from torchvision import transforms
    from torchvision.models import efficientnet_v2_s

    results = {}
    interpolation = transforms.InterpolationMode
    for path in sorted((directory / "images").glob("*.png")):
        image = Image.open(path)
        for size in SIZES:
            sd = transforms.Compose([
                transforms.Resize(size, interpolation=interpolation.LANCZOS), transforms.CenterCrop(size),
                transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
            ])  # fmt: skip
            wuerstchen = transforms.Compose([
                transforms.Resize(size, interpolation=interpolation.BILINEAR, antialias=True), transforms.CenterCrop(size),
                transforms.ToTensor(), transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            ])  # fmt: skip
            results[f"sd/{path.stem}/{size}"] = sd(image)
            results[f"wuerstchen/{path.stem}/{size}"] = wuerstchen(image)
    if (directory / "effnet.safetensors").exists():
        encoder = torch.nn.Module()
        encoder.backbone = efficientnet_v2_s(weights=None).features
        encoder.mapper = torch.nn.Sequential(torch.nn.Conv2d(1280, 16, 1, bias=False), torch.nn.BatchNorm2d(16))
        encoder.load_state_dict(load_file(directory / "effnet.safetensors"), strict=True)
        encoder.eval()
        with torch.no_grad():
            pixels = load_file(directory / "pixels.safetensors")["pixels"]
            results["latents"] = encoder.mapper(encoder.backbone(pixels))
        results["parameters"] = torch.tensor(sum(parameter.numel() for parameter in encoder.backbone.parameters()))
    save_file(results, directory / "results.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
