"""Collecting garbage takes longer than most rows of these tests."""

import pytest
import torch

from benchmarks.tools import rows


@pytest.fixture(scope="session", autouse=True)
def kept_memory():
    """On a CPU, where nothing else needs it, memory is not given back after every row."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(rows, "release_memory", lambda: None)
        yield
