"""Where does the time of a step go? torch's profiler over some steps, for the rows of `benchmarks.steps.step`.

Every kernel is put into a category by its name (`category`): matrix products, convolutions, attention, norms, pointwise,
copies, optimizer; the rest of the time is idle. What no rule knows is `other`, by name. On a CPU operators stand in for
kernels: a run of this path.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.tools.charts import save
from benchmarks.tools.tables import markdown
from benchmarks.tools.timeline import profiled

STEPS = 4
LARGEST = 16  # kernels that are kept by name
DETAILED = ("captured", "compiled and captured")  # levers whose largest kernels are shown
COLOURS = {
    "matrix products": "#3b6ea5", "convolutions": "#6f9fd0", "attention": "#8c6bb1", "norms": "#41ab5d", "pointwise": "#c7a03c",
    "copies": "#b5483b", "optimizer": "#7f6a55", "other": "#707070", "idle": "#e0e0e0",
}  # fmt: skip

_ONLY_MOVES = (
    "_to_copy|clone|cat|permute|view|_unsafe_view|transpose|t|expand|constant_pad_nd|split|split_with_sizes|slice|select|unbind"
)
# Category and what its kernels' names hold, in the order of asking. Inductor names a kernel after the operations fused into
# it, so that its own come before the libraries'. Operators of the CPU have their category by the same rules.
_RULES = [(name, re.compile(pattern)) for name, pattern in (
    ("norms", r"group_norm|layer_norm|batch_norm|var_mean|GroupNorm|LayerNorm|RowwiseMoments|GammaBeta|cuCompute\w*Grad"
              r"|ComputeInternalGradients|Compute(Backward)?FusedParams|gelu_norms|gelu_response"),
    ("convolutions", r"^triton_tem_\w*conv"),
    ("matrix products", r"^triton_tem_"),
    ("copies", rf"^triton_poi_fused(_({_ONLY_MOVES}))+_\d+$"),
    ("pointwise", r"^triton_|^gelu_|engine::gelu|add_noise|diffusion_loss"),
    ("optimizer", r"adamw|square_sum|multi_tensor_apply_kernel(?!.*[Cc]opy)|vector_norm|lpnorm"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|AttentionKernel|softmax|dot_do_o|short_attention"),
    ("copies", r"^Memcpy|^Memset|^memcpy|[Cc]opy|CatArray|nchwToNhwc|nhwcToNchw|FillFunctor|nccl"
               r"|^aten::(clone|cat|contiguous|fill_|zero_|zeros|zeros_like|reshape|empty\w*|to|as_strided|view|t|transpose|permute|expand"
               r"|slice|select|split\w*|unbind|detach|_unsafe_view|unsqueeze|squeeze|narrow|chunk|_reshape_alias|alias|resize_|ones_like)$"),
    ("convolutions", r"fprop|dgrad|wgrad|conv|implicit_gemm|winograd"),
    ("matrix products", r"gemm|nvjet|cutlass|splitK|gemv|cublas|xmma"
                        r"|^aten::(mm|addmm|bmm|baddbmm|linear|matmul|_scaled_mm|dot)$"),
    ("pointwise", r"elementwise|reduce_kernel|upsample|pool2d|[Ss]ort|index|gather|scatter|^aten::|[Bb]ackward|Kernel"),
)]  # fmt: skip


def category(name: str) -> str:
    """The category of a kernel, or of an operator, by its name."""
    return next((found for found, pattern in _RULES if pattern.search(name)), "other")


def summarize(work: list[tuple[str, float]], busy: float, total: float, gap: float, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by category, and its largest kernels; kernels that overlap share the time in which they do."""
    overlap = busy / sum(microseconds for _, microseconds in work)
    scale = overlap / 1000 / steps
    by_category: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for name, microseconds in work:
        by_category[category(name)] += microseconds * scale  # type: ignore[assignment]
        by_name[name] += microseconds * scale  # type: ignore[assignment]
    milliseconds = {name: by_category[name] for name in COLOURS} | {"idle": (total - busy) / 1000 / steps}
    return {
        "step_milliseconds": total / 1000 / steps, "kernels_per_step": len(work) / steps, "milliseconds": milliseconds,
        "longest_gap_milliseconds": gap / 1000,
        "largest": [[name[:160], category(name), value] for name, value in by_name.most_common(LARGEST)],
        "unknown": [[name[:160], value] for name, value in by_name.most_common() if category(name) == "other"][:LARGEST],
    }  # fmt: skip


def measure(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The profile of a training's step that is warmed up, as `summarize` gives it."""
    return summarize(*profiled(step, STEPS, device), STEPS)


def profiles(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The profiles that rows of `benchmarks.steps.step` hold, each with what was profiled."""
    about = ("checkpoint", "lever", "batch")
    return [{name: row[name] for name in about} | row["profile"] for row in rows if "profile" in row]


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and shares by category of every row, and the largest kernels of the engine's defaults (`DETAILED`)."""
    measured = profiles(rows)
    shown = []
    for row in measured:
        shares = {name: f"{value:.2f} ({value / row['step_milliseconds']:.0%})" for name, value in row["milliseconds"].items()}
        shown.append({"milliseconds of a step": f"{row['step_milliseconds']:.2f}", **row, **shares})
    lines = [markdown(shown, {"model": "checkpoint", "lever": "lever", "batch": "batch", "all, ms": "milliseconds of a step",
                              "kernels": "kernels_per_step", **{name: name for name in COLOURS}})]  # fmt: skip
    for row in measured:
        if row["lever"] in DETAILED:
            title = f"The largest of {row['checkpoint']}, {row['lever']}:"
            lines += ["", title, "", "| kernel | category | ms of a step |", "|---|---|---|"]
            lines += [f"| `{name}` | {kind} | {value:.3f} |" for name, kind, value in row["largest"]]
            lines += [f"- unknown to the rules: `{name}`, {value:.3f} ms" for name, value in row["unknown"]]
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Shares of a step's time by category, one bar per row."""
    measured = profiles(rows)
    figure = Figure(figsize=(10, 1.6 + 0.6 * len(measured)), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(measured)
    title = "{checkpoint}, batch {batch}\n{lever}: {step_milliseconds:.1f} ms"
    labels = [title.format(**row) for row in measured]
    for name, colour in COLOURS.items():
        shares = [row["milliseconds"][name] / row["step_milliseconds"] for row in measured]
        bars = panel.barh(labels, shares, left=left, color=colour, label=name)
        panel.bar_label(bars, [f"{share:.0%}" if share > 0.03 else "" for share in shares], label_type="center", fontsize=7)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    panel.invert_yaxis()
    panel.set(xlim=(0, 1), xlabel="share of a step's time")
    panel.tick_params(labelsize=8)
    figure.legend(fontsize=8, frameon=False, ncols=5, loc="outside lower center")
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)
