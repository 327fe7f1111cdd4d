import pytest
import torch

from engine.loop import capture
from tests.loop import tape


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    """Lets a CPU capture; returns what was captured."""
    captured: list[str] = []
    real = capture.capture if torch.cuda.is_available() else tape.capture

    def note(function, stream, pool):
        captured.append("graph")
        return real(function, stream, pool)

    if not torch.cuda.is_available():
        monkeypatch.setattr(capture, "reason_against", lambda *arguments: None)
    monkeypatch.setattr(capture, "capture", note)
    return captured
