"""What the compilers and libraries beneath torch may do: cuBLAS, cuDNN, inductor and Triton."""

import os
from pathlib import Path

import torch
from torch import nn

from engine.config.options import TrainConfig


def configure(config: TrainConfig) -> None:
    """Sets the process-wide switches of cuBLAS and cuDNN; to be called before the first matrix product on a GPU.

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


def keep_compiled_code(directory: Path) -> None:
    """Makes torch.compile and Triton keep what they compile in a directory that outlives the process."""
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ[variable] = str((directory / name).absolute())


def compile_model(model: nn.Module, config: TrainConfig) -> None:
    """Has the model compiled when it is called, in place."""
    if config.compile_cache_dir:
        keep_compiled_code(Path(config.compile_cache_dir))
    model.compile(mode=config.compile_mode)
