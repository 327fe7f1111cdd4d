"""Keeps the libraries' notices and progress bars out of a command line's output; imported before they are."""

import logging
import os
import sys
import warnings

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else the loss of a process is told in pages; read on import

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# diffusers imports DeepSpeed, which probes for accelerators unless it is told.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
# diffusers imports torchao and bitsandbytes where they are installed, whose compiled parts for other machines do not load.
for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)


def quiet_libraries() -> None:
    """Silences the progress bars for files that load at once; those of downloads stay where there is a terminal."""
    import datasets
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
