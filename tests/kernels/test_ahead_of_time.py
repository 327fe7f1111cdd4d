"""Every kernel compiles ahead of time for the architectures that it is meant for, without spilling registers."""

import json
import os
import subprocess
import sys

import pytest

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def report() -> list[dict]:
    """What `benchmarks.registers` finds; in a process of its own, because compiling needs the interpreter off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.registers", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["add_noise", "diffusion_loss"])
def test_kernels_compile_without_spills(report, kernel, target):
    rows = [row for row in report if row["kernel"] == kernel and row["target"] == target]
    assert {row["layout"] for row in rows} == {"contiguous", "channels_last", "flat"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    for row in rows:
        assert row["spills"] == 0, row
        assert 0 < row["registers"] < 255, row
