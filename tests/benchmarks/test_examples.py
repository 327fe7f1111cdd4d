"""What runs the tests of diffusers' examples, on a checkout that holds a few of another kind."""

from benchmarks.runs import examples

TESTS = """
from test_examples_utils import ExamplesTestsAccelerate, run_command

class TestIt(ExamplesTestsAccelerate):
    def test_models_are_there(self):
        assert open("hf-internal-testing/tiny-stable-diffusion-torch/model_index.json").read()

    def test_a_script_that_fails(self):
        run_command(self._launch_args + ["examples/train_dreambooth_lora.py", "--lora_rank", "none"])

    def test_it_sdxl(self):
        assert False
"""


def test_each_test_has_a_row_and_what_no_family_trains_is_left_out(tmp_path):
    checkout, workplace = tmp_path / "checkout", tmp_path / "workplace"
    (checkout / examples.IMAGES).mkdir(parents=True)
    for suite in examples.SUITES:
        (checkout / "examples" / suite).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "examples" / suite).write_text(TESTS)
    examples.write_workplace(workplace, checkout)
    passed, failed = examples.run_suite(workplace, examples.SUITES[0])
    assert passed["passed"]
    assert passed["test"] == "test_models_are_there"
    assert not failed["passed"]
    assert "engine.run: error" in failed["said"]
    (workplace / examples.SUITES[1]).write_text("def test_it(: pass")
    *_, broken = examples.run_suite(workplace, examples.SUITES[1])
    assert (broken["test"], broken["passed"]) == ("the suite", False)
    assert "pytest left with 2" in broken["said"]
    assert [row["left_out"] for row in examples.left_out(checkout)] == ["trains Stable Diffusion XL"] * len(examples.SUITES)
