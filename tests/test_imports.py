"""Imports point down, and never in a circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the bottom to the top; a name stands for the module and for all within.
LAYERS = [
    "engine.launcher", "engine.errors", "engine.messages", "engine.quiet", "engine.catalogue", "engine.files", "engine.failed",
    "engine.storage", "engine.tensors", "engine.picture", "engine.config", "engine.prompts", "engine.liveness",
    "engine.descriptors", "engine.offline", "engine.processes", "engine.backends", "cpp_ext", "engine.philox",
    "engine.permutation", "engine.diffusion", "engine.kernels",
    "engine.data.format", "engine.data.samples", "engine.data.transforms", "engine.data.report", "engine.data.sources",
    "engine.models", "engine.data.identity", "engine.data.plan", "engine.data.handed", "engine.data.claims",
    "engine.data.captions", "engine.data.records", "engine.data.found", "engine.data.together", "engine.data.encode",
    "engine.data.sizes", "engine.data.image_sizes", "engine.data.encode_buckets",
    "engine.data.parts", "engine.data.describe", "engine.data.convert", "engine.data", "engine.loop", "engine.run",
    "engine.shards", "engine.cache", "engine.checkpoint", "engine.drawable", "engine.sample", "engine.export",
    "benchmarks.tools", "benchmarks",
]  # fmt: skip
# Folders -> what their files import of the project at the most; questions import tools and never each other.
QUESTION = ("benchmarks.tools", "engine", "cpp_ext")
ONLY = {
    "engine.data.format": (
        "engine.data.format", "engine.files", "engine.errors", "engine.storage", "engine.tensors", "cpp_ext",
    ),
    "engine.data.samples": (
        "engine.data.samples", "engine.data.format", "engine.philox", "engine.permutation", "engine.diffusion", "cpp_ext",
    ),
    "benchmarks.data": QUESTION, "benchmarks.operations": QUESTION, "benchmarks.steps": QUESTION, "benchmarks.runs": QUESTION,
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("__init__", "__main__"))


FILES = {name_of(path): path for folder in ("engine", "benchmarks", "cpp_ext") for path in (ROOT / folder).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of the project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys() or {node.module}
    return names & FILES.keys()


GRAPH = {name: imported(path) - {name} for name, path in FILES.items()}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer(name: str) -> int:
    return next(number for number, package in enumerate(LAYERS) if within(name, package))


def test_imports_point_down():
    up = {f"{name} imports {other}" for name, others in GRAPH.items() for other in others if layer(other) > layer(name)}
    assert not up


def test_folders_import_only_what_they_need():
    wrong = {f"{name} imports {other}" for folder, allowed in ONLY.items() for name, others in GRAPH.items()
             if within(name, folder) for other in others if not within(other, *allowed)}  # fmt: skip
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    left = dict(GRAPH)
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left


def test_the_libraries_are_quieted_before_they_are_imported():
    assert "engine.quiet" in GRAPH["engine.models"] & GRAPH["engine.loop"]  # which run before any module within
