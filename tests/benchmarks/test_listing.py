"""What a listing costs the processes of a launch: counts, which no machine alters."""

import json
import sys

from benchmarks.data import listing


def test_the_first_asks_for_every_image_and_no_other_process_for_any(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["listing", "--images", "1100", "--json", str(tmp_path / "listing.json")])
    assert listing.main() == 0
    found = json.loads((tmp_path / "listing.json").read_text())
    assert (found["first"]["stat"], found["first"]["os.scandir"]) == (1100, 3)
    assert (found["another"]["stat"], found["another"]["os.scandir"], found["another"]["open"]) == (0, 0, 1)
    assert 170 < found["handed_over"]["bytes_of_the_file"] / 1100 < 190
    assert found["scaled"]["first"]["stat"] == 10_000_000
