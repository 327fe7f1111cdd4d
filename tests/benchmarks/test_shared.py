"""The file system that shows late what other nodes did shows what it should, when it should."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.tools.preloaded import build, can_be_built
from benchmarks.tools.shared import COUNTED, Node

pytestmark = pytest.mark.skipif(not can_be_built(), reason="needs Linux and g++")
DELAY = 1.5
LISTED = "for path in sorted(here.rglob('*')): print(path.relative_to(here), path.read_text() if path.is_file() else '')"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build("shared", tmp_path_factory.mktemp("library"))


@pytest.fixture
def on(tmp_path, library):
    """Runs a program, in which `here` is the shared directory, on a node; the lines that it prints."""
    directory, journal = tmp_path / "shared", tmp_path / "journal"
    directory.mkdir()
    journal.mkdir()

    def run(name: str, program: str, node: Node = Node()) -> list[str]:  # noqa: B008 (it is frozen)
        variables = node.variables(name, directory, journal) | {"LD_PRELOAD": str(library)}
        begin = f"import fcntl, os, shutil, time\nfrom pathlib import Path\nhere = Path({str(directory)!r})\n"
        command = [sys.executable, "-S", "-c", begin + program]
        result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True, timeout=60)
        return [line.strip() for line in result.stdout.splitlines()]

    return run


def test_a_stale_node_sees_what_was_there_until_the_delay_is_over(on):
    on("a", """
for name in ("replaced", "removed", "rewritten"): (here / name).write_text("old")
for name in ("tree", "moved"): (here / name).mkdir(); (here / name / "file").write_text(name)
""")  # fmt: skip
    before, stale = on("a", LISTED), Node(delay=DELAY)
    time.sleep(DELAY)
    changed = time.monotonic()
    on("a", """
(here / "aside").write_text("new"); os.replace(here / "aside", here / "replaced")
(here / "removed").unlink(); shutil.rmtree(here / "tree")
(here / "moved").rename(here / "there"); (here / "there" / "created").write_text("new")
""")  # fmt: skip
    seen = on("b", LISTED, stale)
    own, fresh = on("a", LISTED, stale), on("c", LISTED)
    assert time.monotonic() < changed + DELAY, "too slow to tell"
    assert seen == before
    assert own == fresh == ["replaced new", "rewritten old", "there", "there/created new", "there/file moved"]
    looks = "print((here / 'there').exists(), (here / 'removed').stat().st_size, os.listdir(here / 'moved'))"
    assert on("b", looks, stale) == ["False 3 ['file']"]
    time.sleep(max(changed + DELAY + 0.3 - time.monotonic(), 0))
    assert on("b", LISTED, stale) == fresh


def test_what_a_stale_node_does_itself_it_sees_and_the_server_knows_what_there_is(on):
    on("a", "(here / 'taken').write_text('by a'); (here / 'folder').mkdir()")
    tries = "try:\n    os.open(here / 'taken', os.O_CREAT | os.O_EXCL)\nexcept FileExistsError: print('exists')\n"
    own = "(here / 'own').mkdir(); (here / 'own' / 'file').write_text('b'); (here / 'folder' / 'file').write_text('b')\n"
    looks = "print((here / 'taken').exists(), (here / 'folder').exists())\n"
    assert on("b", looks + tries + own + LISTED, Node(delay=60)) == [
        "False False", "exists", "folder", "folder/file b", "own", "own/file b", "taken by a",
    ]  # fmt: skip


def test_renaming_takes_time_and_others_see_it_half_way(on):
    on("a", "(here / 'from').write_text('x')")
    program = (
        "pid = os.fork()\nif pid == 0:\n    (here / 'from').rename(here / 'to'); os._exit(0)\n"
        "time.sleep(0.2); print((here / 'to').exists())\n"
        "while not (here / 'to').exists(): time.sleep(0.01)\n"
        "print(os.waitpid(pid, os.WNOHANG)[0])\nos.waitpid(pid, 0)"
    )
    assert on("a", program, Node(rename=1.0)) == ["False", "0"]


@pytest.mark.parametrize(
    ("locks", "other", "said"),
    [("none", "a", "No locks available"), ("node", "b", "held"), ("node", "a", "Resource"), ("", "b", "Resource")],
)
def test_locks_are_refused_or_hold_within_a_node(on, locks, other, said):
    program = f"""
def tries(node):
    os.environ["SHARED_NODE"] = node
    try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); print("held", flush=True)
    except OSError as error: print(error.strerror, flush=True)
file = os.open(here / "lock", os.O_RDWR | os.O_CREAT)
tries("a")
if os.fork() == 0: tries({other!r})
else: os.wait()
"""
    first, second = on("a", program, Node(locks=locks))
    assert first == ("held" if locks != "none" else said)
    assert second.startswith(said)


def test_what_a_process_opens_and_reads_is_counted(on):
    on("a", "(here / 'file').write_bytes(b'x' * 1000)")
    program = """
import ctypes, mmap
file = open(here / "file", "rb"); file.read(10); (here / "file").stat(); os.listdir(here)
mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); (here / "file").read_bytes()
counts = (ctypes.c_long * 11)(); ctypes.CDLL(None).shared_counts(counts); print(*counts[:5])
"""
    opened, looked_up, listed, read, mapped = map(int, on("a", program)[0].split())
    assert len(COUNTED) == 5
    assert (opened, looked_up, listed, read, mapped) == (2, 1, 1, 2000, 1000)
