"""What DeepSpeed calls is counted."""

from benchmarks.runs import host_time


def test_what_a_step_calls_is_counted(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    rows = [host_time.measure(1, way, layers=3, steps=3) for way in ("stage 1", "stage 3")]
    assert rows[0]["of_gradients"] == {"allreduce": 1}
    assert rows[1]["of_gradients"]["reduce_scatter_base"] == 1
    assert all(row["seconds"] > 0 for row in rows)
    assert "| stage 3 | 1 |" in host_time.table(rows)
