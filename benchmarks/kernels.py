"""What do the fused operations gain over eager torch and torch.compile? `python -m benchmarks.kernels [--small]`

Each operation runs at the latent shapes of the families, in fp32 and bf16, contiguous and channels-last, beside

- `script`: what the diffusers scripts do, with torch's own random numbers: draw the noise, keep it, combine; for the loss, the
  squared error against the noise that was kept, its mean, and its gradient by autograd;
- `eager`: the operation's reference, with the same counter-based random numbers, in plain torch;
- `compiled`: that reference under torch.compile.

Medians of turns that alternate. Bandwidth counts the bytes that must move once, against a copy of the same size on this device.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import environment
from engine.files import write_json
from engine.kernels import add_noise, diffusion_loss
from engine.kernels.add_noise import per_sample, reference_add_noise
from engine.kernels.diffusion_loss import reference_diffusion_loss

SHAPES: dict[str, tuple[int, ...]] = {
    "SD 512 px, batch 16": (16, 4, 64, 64),
    "Kandinsky decoder 768 px, batch 16": (16, 4, 96, 96),
    "Kandinsky prior, batch 64": (64, 1280),
    "Wuerstchen, batch 16": (16, 16, 24, 24),
}
SMALL: dict[str, tuple[int, ...]] = {"small": (2, 4, 16, 16)}
REPEATS = 15


def inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device) -> dict[str, Tensor]:
    def latents() -> Tensor:
        tensor = torch.randn(shape, device=device).to(dtype)
        return tensor.to(memory_format=torch.channels_last) if channels_last else tensor

    batch = shape[0]
    return {
        "mean": latents(), "std": latents().abs(), "prediction": latents(), "alpha": torch.rand(batch, device=device),
        "sigma": torch.rand(batch, device=device), "weight": torch.rand(batch, device=device),
        "seed": torch.tensor([7], device=device), "slots": torch.arange(batch, device=device),
    }  # fmt: skip


def script_add_noise(values: dict[str, Tensor]) -> Tensor:
    mean = values["mean"]
    clean = mean + values["std"] * torch.randn_like(mean)
    noise = torch.randn_like(mean)
    return per_sample(values["alpha"], mean).to(mean.dtype) * clean + per_sample(values["sigma"], mean).to(mean.dtype) * noise


def script_loss(values: dict[str, Tensor], noise: Tensor) -> Tensor:
    prediction = values["prediction"].detach().requires_grad_()
    error = F.mse_loss(prediction.float(), noise.float(), reduction="none").flatten(1).mean(1)
    (error * values["weight"]).mean().backward()
    return prediction.grad  # type: ignore[return-value]


def sides(values: dict[str, Tensor], compiled: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """Operation -> side -> work. The loss is that of epsilon prediction."""
    v = values
    noise = torch.randn_like(v["mean"])
    nothing, ones = torch.zeros_like(v["alpha"]), torch.ones_like(v["alpha"])
    noising = (v["mean"], v["std"], v["alpha"], v["sigma"], v["seed"], v["slots"], 0.0, 0.0)
    losing = (v["prediction"], v["mean"], v["std"], nothing, ones, v["weight"], v["seed"], v["slots"], 0.0)
    result = {
        "add_noise": {
            "engine": lambda: add_noise(*noising), "script": lambda: script_add_noise(v),
            "eager": lambda: reference_add_noise(*noising),
        },
        "diffusion_loss": {
            "engine": lambda: diffusion_loss(*losing), "script": lambda: script_loss(v, noise),
            "eager": lambda: reference_diffusion_loss(*losing),
        },
    }  # fmt: skip
    if compiled:
        noised, lost = torch.compile(reference_add_noise), torch.compile(reference_diffusion_loss)
        result["add_noise"]["compiled"] = lambda: noised(*noising)
        result["diffusion_loss"]["compiled"] = lambda: lost(*losing)
    return result


def microseconds(works: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """The median time of each work, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(REPEATS + 2):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - started) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shapes: dict[str, tuple[int, ...]], compiled: bool, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    cases = [(name, dtype, last) for name, shape in shapes.items() for dtype in (torch.float32, torch.bfloat16)
             for last in ([False, True] if len(shape) == 4 else [False])]  # fmt: skip
    for name, dtype, channels_last in tqdm(cases, disable=None):
        values = inputs(shapes[name], dtype, channels_last, device)
        latent = values["mean"].numel() * dtype.itemsize
        for operation, works in sides(values, compiled).items():
            # add_noise reads mean and std and writes the noisy latent; the loss reads the prediction and writes its gradient.
            must_move = latent * (3 if operation == "add_noise" else 2)
            source = torch.empty(must_move // 2, dtype=torch.uint8, device=device)
            times = microseconds(works | {"copy": source.clone}, device)
            rows.append({
                "operation": operation, "shape": name, "dtype": str(dtype).removeprefix("torch."),
                "layout": "channels_last" if channels_last else "contiguous", "microseconds": times,
                "gain": {side: times[side] / times["engine"] for side in works if side != "engine"},
                "share_of_copy_bandwidth": times["copy"] / times["engine"],
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="one small shape and no torch.compile, to try the benchmark itself"
    )
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(SMALL if options.small else SHAPES, not options.small, device)
    print(f"{'operation':16}{'shape':36}{'dtype':10}{'layout':15}{'engine us':>10}{'script':>9}{'eager':>9}{'compiled':>10}"
          f"{'copy':>7}")  # fmt: skip
    for row in rows:
        gains = "".join(f"{row['gain'][side]:>{width - 2}.2f} x" if side in row["gain"] else f"{'-':>{width}}"
                        for side, width in (("script", 9), ("eager", 9), ("compiled", 10)))  # fmt: skip
        print(f"{row['operation']:16}{row['shape']:36}{row['dtype']:10}{row['layout']:15}{row['microseconds']['engine']:>10.0f}"
              f"{gains}{row['share_of_copy_bandwidth']:>7.0%}")  # fmt: skip
    if options.json:
        write_json(options.json, {"question": __doc__.splitlines()[0], **environment(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
