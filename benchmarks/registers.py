"""How many registers do the kernels take, and do any spill? Compiled ahead of time; needs no GPU.

    python -m benchmarks.registers [--json]

Registers and spills are read from the compiled binary: for NVIDIA, registers from cuobjdump and spills as the local loads and
stores (LDL, STL) that nvdisasm finds; for AMD, from the metadata of the code object.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.add_noise import add_noise_kernel
from engine.kernels.diffusion_loss import diffusion_loss_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"add_noise": add_noise_kernel, "diffusion_loss": diffusion_loss_kernel}
# The tiles that engine.kernels.layout chooses for four channels.
LAYOUTS = {
    "contiguous": {"ROWS": 1, "GROUPS": 256, "FLAT": False},
    "channels_last": {"ROWS": 4, "GROUPS": 64, "FLAT": False},
    "flat": {"ROWS": 1, "GROUPS": 256, "FLAT": True},
}
DTYPES = ["bf16", "fp16", "fp32"]
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_kernel(kernel: Any, layout: str, dtype: str, target: GPUTarget) -> Any:
    """Compiles with every option of the kernel on, as the JIT would specialise it for aligned pointers and even sizes."""
    constants: dict[str, Any] = {name: True for name in kernel.arg_names if name.startswith("HAS_")} | LAYOUTS[layout]
    innermost = "_channel_stride" if layout == "channels_last" else "_position_stride"
    constants |= {name: 1 for name in kernel.arg_names if name.endswith(innermost)}
    signature, aligned = {}, []
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_pointer"):
            values = {"seed_pointer": "*i64", "slot_pointer": "*i64"}
            sample = any(part in name for part in ("noisy", "mean", "std", "prediction", "gradient")) or name in values
            signature[name] = values.get(name, f"*{dtype}" if sample else "*fp32")
            aligned.append(number)
        elif name in ("offset", "perturbation"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if layout != "flat" and name != "channels":
                aligned.append(number)
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
    return triton.compile(ASTSource(kernel, signature, constexprs=constants, attrs=attributes), target=target)


def usage(compiled: Any, target: GPUTarget) -> tuple[int, int]:
    """Registers per thread, and the number of spilling instructions (NVIDIA) or spilled registers (AMD)."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", assembly))
        return int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0]), spills
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        assembly = _run("nvdisasm", "--print-code", str(cubin))
    return int(re.findall(r"REG:(\d+)", resources)[0]), len(re.findall(r"\b(?:LDL|STL)\b", assembly))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def measure_one(case: tuple[str, str, str, str]) -> dict[str, Any]:
    kernel, target_name, layout, dtype = case
    target = TARGETS[target_name]
    registers, spills = usage(compile_kernel(KERNELS[kernel], layout, dtype, target), target)
    return {
        "kernel": kernel, "target": target_name, "layout": layout, "dtype": dtype,
        "registers": registers, "spills": spills,
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    cases = list(itertools.product(KERNELS, TARGETS, LAYOUTS, DTYPES))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(measure_one, cases))


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.registers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    rows = measure()
    if as_json:
        print(json.dumps(rows))
        return 0
    print(f"{'kernel':16}{'target':10}{'layout':16}{'dtype':8}{'registers':>10}{'spills':>8}")
    for row in rows:
        print("{kernel:16}{target:10}{layout:16}{dtype:8}{registers:>10}{spills:>8}".format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
