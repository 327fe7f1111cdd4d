"""The tests as a measurement: counts, failures, and the test that a process died in."""

import pytest

from benchmarks.campaign import gpu_tests
from benchmarks.tools.rows import Rows


def test_the_tests_of_a_machine_are_counted_and_one_that_kills_is_named(tmp_path, capfd):
    suite = tmp_path / "test_three.py"
    suite.write_text("def test_well(): pass\n\ndef test_wrong():\n    one = 1\n    assert one == 2\n")
    row = Rows(None, "What?").measure("three", 1, lambda: gpu_tests.run_suite([str(suite)]))
    assert row["failed"] == "1 of 2 tests fail", "so that another commit measures it again"
    assert (row["passed"], row["skipped"], row["wrong"]) == (1, 0, 1)
    assert "test_wrong: assert 1 == 2\n" in gpu_tests.table([row])
    assert "assert one == 2" in gpu_tests.table([row])
    assert "test_three.py::test_well PASSED" in capfd.readouterr().out
    suite.write_text("import os\n\ndef test_well(): pass\n\ndef test_kills():\n    os.abort()\n")
    with pytest.raises(RuntimeError, match="pytest ended with -6, in or after .*test_three.py::test_kills"):
        gpu_tests.run_suite([str(suite)])
