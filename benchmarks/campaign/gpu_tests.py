"""Do the tests pass on this machine? `python -m benchmarks.campaign.gpu_tests [--json FILE] [--minutes M] [--suites NAME...]`

Each suite is a pytest of its own: what is marked `gpu`; the kernels, which run as compiled code on a GPU and in Triton's
interpreter on a CPU; and replayed steps, from CUDA graphs on a GPU and from recordings on a CPU. Several processes share its
tests, because most of their time is compiling on one core: the kernels' alone compile some 400 variants. A process that dies
names the test that it died in.
"""

import io
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.tools.question import command_line
from benchmarks.tools.rows import Rows
from benchmarks.tools.tables import markdown

SHARED = ["-n", "8", "--dist", "worksteal"]
MARKED = sorted(str(path) for path in Path("tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
# Suite -> arguments of pytest, and seconds that it takes on an H100 (assumed: from its time on two CPU cores). What compiles
# for other machines needs no GPU.
SUITES: dict[str, tuple[list[str], float]] = {
    "marked gpu": ([*SHARED, "-m", "gpu", *MARKED], 60),
    "kernels": ([*SHARED, "--ignore=tests/kernels/test_ahead_of_time.py", "tests/kernels"], 45),
    "graphs": ([*SHARED, "-m", "not gpu", "-k", "replayed or captured or graphs", "tests/loop"], 45),
    "small": (["tests/test_errors.py"], 5),
}
DEFAULT = ["marked gpu", "kernels", "graphs"]
HANGS = 90  # seconds after which a test that still runs prints where it is
TRACE = 3000  # characters of a failure that are kept
SHOWN, LINES = 5, 20  # failures whose last lines are shown: those after them mostly come of the first


def run_suite(arguments: list[str]) -> dict[str, Any]:
    """Counts of a suite's outcomes, and its failures.

    Raises:
        RuntimeError: the process died, with the test it was in.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        # Without the project's own options, whose -q takes the -v back; where a test hangs is printed.
        options = ["-v", "-o", "addopts=", "-o", f"faulthandler_timeout={HANGS}", "--durations=20",
                   "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={report}"]  # fmt: skip
        code, output = shown([sys.executable, "-m", "pytest", *options, *arguments])
        if not report.exists():
            started = re.findall(r"^\S+::\S+", output, re.MULTILINE)
            raise RuntimeError(f"pytest ended with {code}, in or after {started[-1] if started else 'collection'}")
        return outcomes(report)


def shown(command: list[str]) -> tuple[int, str]:
    """The exit code and output of a command, which is passed on as it comes: should it hang, the log says where."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert isinstance(process.stdout, io.BufferedReader)
        output = bytearray()
        while chunk := process.stdout.read1():
            output += chunk
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    return process.returncode, output.decode(errors="replace")


def outcomes(report: Path) -> dict[str, Any]:
    """What a JUnit report of pytest says; a suite of which a test fails is a row that failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = []
    skipped = 0
    for case in cases:
        broken = [child for child in case if child.tag in ("failure", "error")]
        skipped += any(child.tag == "skipped" for child in case)
        if broken:
            message = (broken[0].get("message") or "").splitlines() or [""]
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "message": message[0],
                             "trace": (broken[0].text or "")[-TRACE:]})  # fmt: skip
    row = {"passed": len(cases) - skipped - len(failures), "skipped": skipped, "wrong": len(failures), "failures": failures}
    return row | ({"failed": f"{len(failures)} of {len(cases) - skipped} tests fail"} if failures else {})


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by suite, and the failures."""
    lines = [markdown(rows, {"suite": "name", "passed": "passed", "skipped": "skipped", "failed": "wrong"})]
    for number, failure in enumerate(failure for row in rows for failure in row.get("failures", [])):
        lines.append(f"- {failure['test']}: {failure['message']}")
        if number < SHOWN:
            lines.append("\n```\n" + "\n".join(failure["trace"].splitlines()[-LINES:]) + "\n```\n")
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=DEFAULT, help="default: %(default)s")
    options = parser.parse_args()
    kept = Rows(options.json, __doc__, options.minutes)
    rows = []
    for suite in options.suites:
        arguments, seconds = SUITES[suite]
        rows.append(kept.measure(suite, seconds, partial(run_suite, arguments)))
    print(table(rows))
    return kept.exit_code


if __name__ == "__main__":
    sys.exit(main())
