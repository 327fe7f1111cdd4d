"""Commands run in the process of the tests: importing torch and diffusers takes longer than what most of them do."""

import contextlib
import importlib
import io
import subprocess
import sys
import traceback
from typing import Any
from unittest import mock

from engine.errors import exit_code


def run(command: list[str], **unused: Any) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE ...` or `python -c CODE ...` prints, and its exit code, as `subprocess.run` gives them."""
    _, kind, what, *arguments = command

    def main() -> int:
        if kind == "-m":
            return exit_code(what, importlib.import_module(what).main)
        exec(what, {"__name__": "__main__"})
        return 0

    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [what, *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            code = main()
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())
