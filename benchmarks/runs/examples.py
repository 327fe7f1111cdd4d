"""Do diffusers' tests of its scripts pass with the engine in their place? `python -m benchmarks.runs.examples CHECKOUT`

CHECKOUT is a checkout of github.com/huggingface/diffusers, whose tests are run as they are. Models and data lie in local
folders of the names that they have on the hub, tiny and random; what starts a script starts `python -m engine.run` instead.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import engine.quiet  # noqa: F401 (before the libraries that it quiets)

# isort: split
from benchmarks.tools.rows import write_result
from benchmarks.tools.tables import markdown

SUITES = (
    "text_to_image/test_text_to_image.py", "text_to_image/test_text_to_image_lora.py", "dreambooth/test_dreambooth.py",
    "dreambooth/test_dreambooth_lora.py",
)  # fmt: skip
LEFT_OUT = {"sdxl": "trains Stable Diffusion XL", "_if": "trains DeepFloyd IF, on pixels"}  # by a part of a test's name
IMAGES = "docs/source/en/imgs"  # of the checkout, in which DreamBooth's tests find theirs
# In the place of examples/test_examples_utils.py.
STAND_IN = """
import subprocess
import sys
from pathlib import Path

LORA = ["--lora_rank", "4"]  # the scripts' default
OPTIONS = {
    "train_text_to_image.py": [], "train_text_to_image_lora.py": LORA,
    "train_dreambooth.py": [], "train_dreambooth_lora.py": LORA,
}


class ExamplesTestsAccelerate:
    _launch_args = []


def run_command(command):
    script, *options = command
    command = [sys.executable, "-m", "engine.run", "--family", "sd", *OPTIONS[Path(script).name], *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}: {ended.stderr}"
"""


def write_workplace(directory: Path, checkout: Path) -> None:
    """What the tests find around them, in a directory that they are run in."""
    from examples.photographs import write_images
    from examples.tiny_models import write_stable_diffusion

    directory.mkdir(exist_ok=True)
    hub = directory / "hf-internal-testing"
    made = write_stable_diffusion(directory / "model")["pretrained_model_name_or_path"]
    hub.mkdir()
    Path(made).rename(hub / "tiny-stable-diffusion-torch")
    write_images(hub / "dummy_image_text_data", longest=64)
    shutil.copytree(checkout / IMAGES, directory / IMAGES)
    (directory / "test_examples_utils.py").write_text(STAND_IN)
    for suite in SUITES:
        (directory / suite).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkout / "examples" / suite, directory / suite)


def run_suite(directory: Path, suite: str) -> list[dict[str, Any]]:
    """A row for each test."""
    report = directory / "report.xml"
    left_out = " and ".join(f"not {part}" for part in LEFT_OUT)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "-p",
        "no:cacheprovider",
        "-k",
        left_out,
    ]
    roots = os.pathsep.join([str(directory), str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = os.environ | {"PYTHONPATH": roots}
    report.unlink(missing_ok=True)  # of another suite
    code = subprocess.run([*command, f"--junitxml={report}", suite], cwd=directory, env=common, check=False).returncode
    rows: list[dict[str, Any]] = []
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        failed = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        said = {} if failed is None else {"said": (failed.text or "").strip()[-500:]}
        rows.append({"suite": suite, "test": case.get("name"), "passed": failed is None, **said})
    if code not in (0, 1) or not rows:
        rows.append(
            {"suite": suite, "test": "the suite", "passed": False, "said": f"pytest left with {code}, no test to the end"}
        )
    return rows


def left_out(checkout: Path) -> list[dict[str, Any]]:
    """A row for each test that is of models which the engine does not train."""
    lines = [(suite, line) for suite in SUITES for line in (checkout / "examples" / suite).read_text().splitlines()]
    names = [(suite, line.split("def ")[1].split("(")[0]) for suite, line in lines if line.lstrip().startswith("def test_")]
    return [
        {"suite": suite, "test": name, "left_out": reason}
        for suite, name in names for part, reason in LEFT_OUT.items() if part in name
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks.runs.examples", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of github.com/huggingface/diffusers")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write_workplace(directory, options.checkout)
        rows = [row for suite in SUITES for row in run_suite(directory, suite)]
    rows += left_out(options.checkout)
    print(markdown(rows, {"suite": "suite", "test": "test", "passed": "passed", "left out": "left_out"}))
    write_result(options.json, __doc__, rows=rows)
    return 0 if all(row.get("passed", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
