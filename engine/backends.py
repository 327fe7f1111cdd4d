"""What the compilers and libraries beneath torch may do: cuBLAS, cuDNN, inductor and Triton."""

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from engine import launcher
from engine.config.options import TrainConfig

# Where libraries keep what they compile, by the variables that say so.
_CODE = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TORCH_EXTENSIONS_DIR": "extensions"}
_MOST_THREADS = 32  # of inductor, as by itself


def configure(config: TrainConfig) -> None:
    """Sets the process-wide switches of cuBLAS, cuDNN and the compilers; to be called before the first matrix product on a GPU.

    By default cuDNN times its algorithms for every shape of a convolution and keeps the fastest, and gradients may be summed in
    any order: two runs differ in their last bits. Under `--deterministic` every operation repeats its bits, or raises.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.benchmark = not config.deterministic
    # Convolutions and the backward passes of attention obey it too; cuDNN's attention is then not taken.
    torch.use_deterministic_algorithms(config.deterministic)
    # Else every `torch.empty` is written once more; nothing here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.deterministic:
        # Read when a process first uses cuBLAS: workspaces that do not depend on the order of streams.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if config.compile_cache_dir:
        keep_compiled_code(Path(config.compile_cache_dir))
    elif launcher.world() > 1:
        keep_compiled_code(_directory_of_the_node(), os.environ)
    if launcher.local_world() > 1:
        _share_processors()


def keep_compiled_code(directory: Path, unless: Mapping[str, str] = MappingProxyType({})) -> None:
    """Makes torch.compile, Triton and DeepSpeed keep what they compile in a directory that outlives the process.

    Args:
        unless: variables that stay what they are, where they say something.
    """
    for variable, name in _CODE.items():
        if not unless.get(variable):
            os.environ[variable] = str((directory / name).absolute())


def _directory_of_the_node() -> Path:
    """A directory of this user's alone on a disk of the node. A home directory may be a network's: all nodes would compile into
    the same files there, each as slowly as that is."""
    name = f"compiled-code-{os.getuid()}"
    # Anybody may have put something there; of a name that all this node's processes find, few others think.
    for directory in (Path(tempfile.gettempdir(), known) for known in (name, f"{name}-{launcher.boot()}")):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        status = directory.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return directory
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))  # for what another user put there would run here


def _share_processors() -> None:
    """Has each of a node's processes compile in its part of the threads, unless it was said in how many."""
    if not os.environ.get(variable := "TORCHINDUCTOR_COMPILE_THREADS"):
        part = min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // launcher.local_world(), _MOST_THREADS)
        os.environ[variable] = str(max(part, 1))
        if inductor := sys.modules.get("torch._inductor.config"):  # which has read the variable
            inductor.compile_threads = max(part, 1)  # type: ignore[attr-defined]


def inductor_options(mode: str, on_gpu: bool) -> dict[str, Any]:
    """What torch.compile is given for one of its modes."""
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode))
    if on_gpu:
        # The training form stores images channels last. In a model of convolutions inductor would do so with whatever has four
        # dimensions, and copied the queries and results of Wuerstchen's attention, [B, heads, N, head size], there and back.
        options["layout_optimization"] = False
    return options


def compile_model(model: nn.Module, config: TrainConfig, shapes: int) -> None:
    """Has the model compiled when it is called, in place: once for each of so many shapes, whose sizes the code then knows.

    A pass without gradients, as DREAM's and that of the held-out loss, is compiled by itself.
    """
    options = inductor_options(config.compile_mode, any(parameter.is_cuda for parameter in model.parameters()))
    if shapes < 2:
        model.compile(options=options)
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 3 * shapes)
    model.compile(options=options, dynamic=False)
