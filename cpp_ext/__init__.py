"""C++ extensions: plain shared libraries without torch headers, built on first use in about a second and kept."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from engine.files import lock, unlock

_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra")
_PATIENCE = 60  # seconds to wait for another process that builds libraries, each of which takes some


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "diffusion-training-engine"


def _processor() -> str:
    """What tells processors apart that code built for one may not run on: a home directory can be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@contextlib.contextmanager
def _turn(library: Path) -> Iterator[None]:
    """Waits until the library is there or no other process builds any: all those of a cluster may want it at once."""
    given_up, held = time.monotonic() + _PATIENCE, None
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        while (held := lock(library.parent)) is None and not library.exists() and time.monotonic() < given_up:
            time.sleep(0.1)
    try:
        yield
    finally:
        if held is not None:
            unlock(held, library.parent)


@functools.cache
def load(name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library built from `name`.cpp beside this file; None, with one line that says why, where it cannot be built.

    Args:
        flags: for the compiler, beside those that all libraries are built with.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        print(f"cpp_ext: no C++ compiler for {source.name} (set CXX); going on in Python, slower", file=sys.stderr)
        return None
    words = [compiler, *_FLAGS, *flags]
    machine = _processor() if "-march=native" in flags else platform.machine()
    key = hashlib.sha256(source.read_bytes() + " ".join([*words, machine]).encode()).hexdigest()[:16]
    library = _cache_directory() / f"{name}-{key}.so"
    try:
        with _turn(library):
            if not library.exists():
                # Built aside and renamed: where turns cannot be taken, several processes build at once.
                with tempfile.TemporaryDirectory(dir=library.parent) as directory:
                    built = Path(directory) / library.name
                    subprocess.run([*words, str(source), "-o", str(built)], check=True, capture_output=True, text=True)
                    built.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).splitlines()[0]
        print(f"cpp_ext: {source.name} cannot be built ({reason}); going on in Python, slower", file=sys.stderr)
        return None
