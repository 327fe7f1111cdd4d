"""Reading from a server is measured, and readers are killed."""

import json
import sys

from benchmarks.data import remote


def test_reading_from_a_server_is_measured(monkeypatch, tmp_path, capsys):
    small = {"SHARDS": 6, "SHARD": {"prior": 32}, "LATENCIES": [0.0], "BATCH": 8}
    for name, value in (small | {"KILLS": 2}).items():
        monkeypatch.setattr(remote, name, value)
    monkeypatch.setattr(sys, "argv", ["remote", "--json", str(tmp_path / "remote.json")])
    assert remote.main() == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "remote.json").read_text())["rows"]}
    assert all(row["samples_per_second"] > 0 for name, row in rows.items() if name != "kills")
    assert (rows["kills"]["corrupt_files"], rows["kills"]["left"]) == (0, [])
    assert "prior, cache, 0 ms" in capsys.readouterr().out
