"""The libraries of the hub, kept to what is on the disk."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps the hub's libraries to what is on the disk, whether they were imported before or are inside."""
    variables, before = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), dict(os.environ)
    modules = ("huggingface_hub.constants", "datasets.config")  # which read the variables once

    def switch(offline: bool) -> None:
        for module in filter(None, map(sys.modules.get, modules)):
            for name in variables:
                if hasattr(module, name):
                    setattr(module, name, offline)

    was = any(before.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in (*variables, "TRANSFORMERS_OFFLINE"))
    os.environ.update(dict.fromkeys(variables, "1"))
    switch(True)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
        switch(was)
