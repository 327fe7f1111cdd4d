"""What a group of processes costs, counted for the fewest."""

import pytest

from benchmarks.runs import mesh
from benchmarks.tools.preloaded import build, can_be_built


@pytest.mark.skipif(not can_be_built(), reason="needs Linux and g++")
def test_a_group_connects_all_or_those_that_talk(tmp_path):
    library = build("shared", tmp_path)
    rows = [mesh.measure(library, 2, lazy) for lazy in (False, True)]
    assert all(0 < row["messages"] <= row["messages_used"] and 0 < row["descriptors_used"] < 20 for row in rows)
    assert rows[1]["descriptors"] < rows[0]["descriptors"], "none is connected before it is talked to"
    assert len(mesh.table(rows).splitlines()) == 4
