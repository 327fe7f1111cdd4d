"""What do the kernels compile to? Instructions, registers, shared memory, spills, width of loads; needs no GPU.

    python -m benchmarks.operations.registers [--representative] [--json]

Compiled ahead of time. For NVIDIA, registers and shared memory are read with cuobjdump; spills are the local loads and stores
(LDL, STL) that nvdisasm finds, and `wide` is how many of the loads from and stores to global memory that move a tile are 128
bits wide; `loops` are instructions of the normalisation's loops per 16 elements and thread, in brackets those of the special
function unit. For AMD, registers, shared memory (LDS) and spills are in the metadata of the code object; `wide` counts dwordx4.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.adamw_ema import BLOCK, VECTOR, adamw_ema_kernel
from engine.kernels.add_noise import add_noise_kernel
from engine.kernels.diffusion_loss import diffusion_loss_kernel
from engine.kernels.gelu import gelu_backward_kernel, gelu_kernel
from engine.kernels.gelu import tiling as gelu_tiling
from engine.kernels.gelu_response_norm import (
    dropped_of,
    gelu_norms_kernel,
    gelu_response_backward_kernel,
    gelu_response_norm_kernel,
    gelu_response_sums_kernel,
    tilings,
)
from engine.kernels.group_norm_silu import (
    NUM_WARPS,
    group_norm_gradient_sums_kernel,
    group_norm_silu_backward_kernel,
    group_norm_silu_kernel,
    group_norm_sums_kernel,
    tiling,
)
from engine.kernels.layout import positions_of, strides, tile
from engine.kernels.short_attention import most_registers, short_attention_backward_kernel, short_attention_kernel, tiles
from engine.kernels.short_attention import tiling as attention_tiling
from engine.kernels.square_sum import BLOCK as SQUARE_SUM_BLOCK
from engine.kernels.square_sum import TURNS, square_sum_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES = list(_TORCH_DTYPES)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INTEGERS = {"rounding_pointer": "*i64", "seed_pointer": "*i64", "slot_pointer": "*i64", "mask_pointer": "*u8"}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as the JIT would choose it.

    variant: what it is called; constants: its compile-time arguments; samples: the pointers that have the data's dtype;
    integers: the values of its integer arguments, of which the JIT looks whether they are 1 or multiples of 16.
    moved: how many elements a program handles in one turn of its loops.
    in_bf16: the pointers whose data is bf16, whatever the dtype of the others.
    """

    kernel: Any
    variant: str
    constants: dict[str, Any]
    samples: tuple[str, ...]
    integers: dict[str, int] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    in_bf16: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


def _latent_cases() -> list[Case]:
    """`add_noise` and `diffusion_loss` over latents: of SD with every option on; then plain, as most runs are, of all families.

    In the tiles that engine.kernels.layout chooses; the loss also with each of its options alone.
    """
    every_option = {"HAS_OFFSET": True, "HAS_PERTURBATION": True, "HAS_MASK": True, "HUBER": True}
    plain = dict.fromkeys(every_option, False)
    kinds: dict[str, tuple[tuple[int, ...], torch.memory_format, dict[str, bool]]] = {
        "contiguous": ((4, 64, 64), torch.contiguous_format, every_option),
        "channels_last": ((4, 64, 64), torch.channels_last, every_option),
        "flat": ((4, 5, 7), torch.contiguous_format, every_option),
        "plain": ((4, 64, 64), torch.contiguous_format, plain),
        "plain, 1280": ((1280,), torch.contiguous_format, plain),
        "plain, 16 x 24 x 24": ((16, 24, 24), torch.contiguous_format, plain),
        "Huber": ((4, 64, 64), torch.contiguous_format, plain | {"HUBER": True}),
        "mask": ((4, 64, 64), torch.contiguous_format, plain | {"HAS_MASK": True}),
    }
    cases = []
    for variant, (shape, memory_format, options) in kinds.items():
        latents = torch.empty(2, *shape, device="meta").contiguous(memory_format=memory_format)
        tiling = tile(latents, shape[0])
        flat = tiling.positions != positions_of(latents)
        integers = {"channels": tiling.channels, "positions": tiling.positions, "channel_positions": positions_of(latents)}
        for tensor in ("noisy", "mean", "prediction"):
            for dimension, stride in zip(("batch", "channel", "position"), strides(latents, tiling), strict=True):
                integers[f"{tensor}_{dimension}_stride"] = stride
        constants = {"HAS_STD": True, **options, "FLAT": flat, "ROWS": tiling.rows, "GROUPS": tiling.groups}
        for kernel, samples in ((add_noise_kernel, ("noisy", "mean", "std")),
                                (diffusion_loss_kernel, ("gradient", "prediction", "mean", "std"))):  # fmt: skip
            known = {name: value for name, value in constants.items() if name in kernel.arg_names}
            if variant in ("Huber", "mask") and kernel is add_noise_kernel:
                continue
            cases.append(Case(kernel, variant, known, samples, integers, {"num_warps": tiling.num_warps}))
    return cases


def _group_norm_cases(dtype: str, target: str) -> list[Case]:
    """At the highest resolution of SD (groups of 10 channels), further down (40), and for the decoder's 1152 channels (36)."""
    found = []
    nvidia = TARGETS[target].backend == "cuda"
    for group, positions in ((10, 64 * 64), (40, 16 * 16), (36, 24 * 24)):
        x = torch.empty(32, 32 * group, positions, dtype=_TORCH_DTYPES[dtype], device="meta")
        tiles, options = tiling(x, 32, True, nvidia), {"num_warps": NUM_WARPS}
        moved = tiles.constants["ROWS"] * tiles.constants["WIDTH"]
        integers = {"positions": positions, "chunk": tiles.chunk, "weight_stride": 0, "bias_stride": 0}
        for kernel, samples in (
            (group_norm_silu_kernel, ("y", "x", "weight", "bias")), (group_norm_sums_kernel, ("x",)),
            (group_norm_silu_backward_kernel, ("x_gradient", "y_gradient", "x", "weight", "bias")),
            (group_norm_gradient_sums_kernel, ("y_gradient", "x", "weight", "bias")),
        ):  # fmt: skip
            found.append(Case(kernel, f"{group} per group", tiles.known_to(kernel), samples, integers, options, moved))
    return found


def _response_norm_cases(dtype: str) -> list[Case]:
    """At Wuerstchen's 6,144 channels and 24 x 24 positions, with its dropout and without."""
    adding, writing = tilings(6144, _TORCH_DTYPES[dtype])
    affine, tensors = ("gamma", "beta"), ("y_gradient", "u", "u_gradient", "y")
    found = []
    for kernel, tiling_of in (
        (gelu_norms_kernel, adding), (gelu_response_norm_kernel, writing),
        (gelu_response_sums_kernel, adding), (gelu_response_backward_kernel, writing),
    ):  # fmt: skip
        options = {"num_warps": tiling_of["num_warps"]}
        constants = {name: value for name, value in tiling_of.items() if name not in options}
        moved = constants["ROWS"] * constants["WIDTH"]
        drops = {"dropout": {"DROPPED": dropped_of(0.1)}, "no dropout": {"DROPPED": 0}}
        for variant, chance in (drops if "DROPPED" in kernel.arg_names else {"any": {}}).items():
            found.append(Case(kernel, variant, constants | chance, affine + tensors, {"positions": 576}, options, moved))
    return found


def _gelu_cases(dtype: str) -> list[Case]:
    """Between the linear layers of SD's transformer blocks at the highest resolution, and of the Kandinsky prior's."""
    return [
        Case(kernel, variant, {"GATED": gated, **gelu_tiling(columns, _TORCH_DTYPES[dtype])}, samples, {"rows": rows})
        for variant, gated, columns, rows in (("gated, 1280", True, 1280, 4096), ("8192", False, 8192, 81))
        for kernel, samples in ((gelu_kernel, ("y", "x")), (gelu_backward_kernel, ("x_gradient", "y_gradient", "x")))
    ]


def _attention_cases(dtype: str, target: str) -> list[Case]:
    """At SD 2's lowest resolution, in the Kandinsky prior, and in the largest tiles.

    Those that there are for some targets and dtypes alone come last: no fp32, and on sm_80 no backward pass of more than 64
    tokens, which is torch's (`pays_on`).
    """
    found = []
    pointers = ("y", "projected", "mask", "y_gradient", "projected_gradient")
    forward, backward = short_attention_kernel, short_attention_backward_kernel
    shapes = {"64 tokens": (64, False), "81 tokens, mask": (81, True), "128 tokens": (128, False)}
    for kernel, variants in (
        (forward, ["64 tokens"]),
        (backward, ["64 tokens"]),
        (forward, [*shapes][1:]),
        (backward, [*shapes][1:]),
    ):
        for variant in variants:
            tokens, masked = shapes[variant]
            constants: dict[str, Any] = attention_tiling(tokens, 32, 64, TARGETS[target].backend == "hip")
            capability = divmod(int(TARGETS[target].arch), 10) if TARGETS[target].backend == "cuda" else None
            options: dict[str, int] = {"num_warps": constants.pop("num_warps")}
            options |= most_registers(constants, capability) if kernel is backward else {}
            row = sum(tiles(tokens)[1:]) if masked else 0
            integers = {"tokens": tokens, "sample_stride": tokens * row, "row_stride": row}
            constants |= {} if masked else {"mask_pointer": None}
            found.append(Case(kernel, variant, constants, pointers, integers, options))
    return [] if dtype == "fp32" else found[:4] if target == "sm_80" else found


def _optimizer_cases() -> list[Case]:
    """AdamW, as most runs have it, and Lion; then both on bf16 weights, which need no second copy."""
    kinds = {"any count": (False, False), "Lion": (True, False), "bf16 masters": (False, True),
             "Lion, bf16 masters": (True, True)}  # fmt: skip
    cases = []
    for variant, (lion, rounds) in kinds.items():
        constants: dict[str, Any] = {
            "LION": lion, "ROUNDS": rounds, "HAS_WEIGHTS": not rounds, "HAS_EMA": True, "BLOCK": BLOCK, "VECTOR": VECTOR,
        }  # fmt: skip
        options: dict[str, Any] = {"enable_fp_fusion": False} if rounds else {}
        in_bf16 = ("master", "exp_avg", "exp_avg_sq") if rounds else ()
        integers = {"elements": 859_520_964}
        cases.append(Case(adamw_ema_kernel, variant, constants, ("gradient", "weights"), integers, options, in_bf16=in_bf16))
    return cases


_CASES = [
    *_latent_cases(),
    *_optimizer_cases(),
    Case(square_sum_kernel, "any count", {"BLOCK": SQUARE_SUM_BLOCK, "TURNS": TURNS, "VECTOR": VECTOR}, ("tensor",),
         {"elements": 859_520_964}),
]  # fmt: skip


def cases(dtype: str, target: str) -> list[Case]:
    norms = _group_norm_cases(dtype, target) + _response_norm_cases(dtype)
    return _CASES + _gelu_cases(dtype) + norms + _attention_cases(dtype, target)


def compile_case(case: Case, dtype: str, target: GPUTarget) -> Any:
    """Compiles one specialisation, for pointers that are aligned."""
    signature, constants, aligned = {}, dict(case.constants), []
    for parameter in case.kernel.params:
        name, value = parameter.name, case.integers.get(parameter.name)
        if value == 1 and not parameter.do_not_specialize:
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_pointer"):
            of = name.removesuffix("_pointer")
            kind = "bf16" if of in case.in_bf16 else dtype if of in case.samples else "fp32"
            signature[name] = f"*{kind}" if of in case.samples else _INTEGERS.get(name, f"*{kind}")
            aligned.append(parameter.num)
        elif value is None:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(parameter.num)
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=case.options)


def usage(compiled: Any, target: GPUTarget) -> dict[str, Any]:
    """Instructions, registers of a thread, bytes of shared memory, spills, what is 128 bits wide, and Hopper's products."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", assembly))
        loads, stores = (re.findall(rf"\b(?:global|buffer)_{kind}_(\w+)", assembly) for kind in ("load", "store"))
        wide = [sum(width.startswith("dwordx4") for width in found) for found in (loads, stores)]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0])
        instructions = len(re.findall(r"^\s+[vsdgb]\w*_\w+", assembly, re.MULTILINE))
        loops = []
    else:
        with tempfile.TemporaryDirectory() as directory:
            cubin = Path(directory) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            resources = _run("cuobjdump", "--dump-resource-usage", str(cubin))
            assembly = _run("nvdisasm", "--print-code", str(cubin))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
        loads, stores = (re.findall(rf"\b{kind}\.E([\w.]*)", assembly) for kind in ("LDG(?:STS)?", "STG"))
        wide = [sum(".128" in width for width in found) for found in (loads, stores)]
        registers = int(re.findall(r"REG:(\d+)", resources)[0])
        instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?[A-Z]", assembly))
        loops = _loops(assembly)
    return {
        "instructions": instructions, "registers": registers, "shared": compiled.metadata.shared, "spills": spills,
        "loads": len(loads), "wide_loads": wide[0], "stores": len(stores), "wide_stores": wide[1],
        "loops": loops, "warp_group_products": len(re.findall(r"\bHGMMA", assembly)),
    }  # fmt: skip


def _loops(assembly: str) -> list[tuple[int, int]]:
    """Of each loop, in order: its instructions, and those of the special function unit among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for label, instruction in re.findall(r"^\s*\.(L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+([^;]+);", assembly, re.MULTILINE):
        if label:
            labels[label] = len(instructions)
            continue
        instructions.append(instruction)
        target = re.search(r"\bBRA\b.*\.(L_x_\d+)", instruction)
        # A branch to itself pads the end of a kernel.
        if target and labels.get(target[1], len(instructions)) < len(instructions) - 1:
            body = instructions[labels[target[1]] :]
            loops.append((len(body), sum("MUFU" in line for line in body)))
    return loops


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def measure_one(work: tuple[int, str, str]) -> dict[str, Any]:
    number, dtype, target = work
    case = cases(dtype, target)[number]
    names = {"kernel": case.name, "target": target, "variant": case.variant, "dtype": dtype}
    row = names | usage(compile_case(case, dtype, TARGETS[target]), TARGETS[target])
    # A thread's share of what a program handles in one turn.
    elements = case.moved / (TARGETS[target].warp_size * case.options.get("num_warps", 4))
    row["loops"] = [[round(16 * count / elements) for count in loop] for loop in row["loops"]] if elements else []
    return row


def measure(representative: bool) -> list[dict[str, Any]]:
    """A row for each variant, target and dtype.

    Args:
        representative: only each kernel's first variant for all targets and dtypes; of the others, bf16 on sm_90.
    """
    names = [case.name for case in cases("bf16", "sm_90")]
    work = [
        (number, dtype, target)
        for number, name in enumerate(names)
        for target in TARGETS
        for dtype in DTYPES
        if number < len(cases(dtype, target))
        and (not representative or names.index(name) == number or (dtype, target) == ("bf16", "sm_90"))
    ]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(measure_one, work))


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.operations.registers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--representative", action="store_true", help="only a variant of each kernel, and the others in bf16 on sm_90"
    )
    options = parser.parse_args()
    rows = measure(options.representative)
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"{'kernel':26}{'variant':22}{'target':8}{'dtype':6}{'instructions':>13}{'registers':>10}{'shared':>8}{'spills':>8}"
          f"{'wide loads':>12}{'wide stores':>13}  loops")  # fmt: skip
    for row in rows:
        loads, stores = (f"{row[f'wide_{kind}']} of {row[kind]}" for kind in ("loads", "stores"))
        print("{kernel:26}{variant:22}{target:8}{dtype:6}{instructions:>13}{registers:>10}{shared:>8}{spills:>8}".format(**row)
              + f"{loads:>12}{stores:>13}  " + " + ".join("{} ({})".format(*loop) for loop in row["loops"]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
