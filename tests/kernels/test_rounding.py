"""Steps without fp32 masters, rounded stochastically, and Lion: the same bits on every side, and right in the mean."""

import pytest
import torch

from engine.kernels import adamw_ema_, cpu, lion_ema_
from engine.kernels.adamw_ema import launch_adamw_ema_, launch_lion_ema_, reference_adamw_ema_, reference_lion_ema_
from engine.kernels.rounding import reference_round, reference_words
from tests.kernels.cases import DEVICE, DTYPES, run_kernels

ADAMW = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "weight_decay": 0.02}
LION = {"beta_1": 0.9, "beta_2": 0.99, "weight_decay": 0.02}
needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
SIDES = {
    "adamw": (reference_adamw_ema_, launch_adamw_ema_, cpu.run_adamw_ema_, ADAMW),
    "lion": (reference_lion_ema_, launch_lion_ema_, cpu.run_lion_ema_, LION),
}
COUNTS = [1, 7, 8, 1023, 1032, 4095, 4096, 4100, 5000, 9001]
SEED = -(2**40) - 11


def state(kind: str, elements: int, gradient_dtype: torch.dtype, ema: bool, dtype: torch.dtype = torch.bfloat16) -> dict:
    generator = torch.Generator().manual_seed(elements)

    def draw() -> torch.Tensor:
        return torch.randn(elements, generator=generator)

    moments = {"exp_avg": 0.1 * draw(), "exp_avg_sq": 0.01 * draw().square()}
    values = {"master": draw(), **moments} if kind == "adamw" else {"master": draw(), "exp_avg": moments["exp_avg"]}
    values = {name: value.to(dtype) for name, value in values.items()}
    return values | {"gradient": draw().to(gradient_dtype), "weights": None, "ema": draw() if ema else None}


def scalars(step: float = 3, factor: float = 0.37) -> dict:
    return {"learning_rate": torch.tensor([1e-2]), "factor": torch.tensor([factor]), "step": torch.tensor([float(step)]),
            "ema_weight": torch.tensor([0.25])}  # fmt: skip


def stepped(side, values: dict, numbers: dict, options: dict, rounding: torch.Tensor | None, device: str = "cpu") -> dict:
    results = {name: None if value is None else value.clone().to(device) for name, value in values.items()}
    tensors = [*results.values(), *(number.to(device) for number in numbers.values())]
    side(*tensors, *options.values(), *([] if rounding is None else [rounding.to(device)]))
    return {name: None if value is None else value.cpu() for name, value in results.items()}


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("elements", COUNTS)
def test_all_sides_give_the_same_bits(kind, elements):
    reference, launch, in_cpp, options = SIDES[kind]
    rounding = torch.tensor([SEED, 5])
    for gradient_dtype in DTYPES:
        values, numbers = state(kind, elements, gradient_dtype, ema=True), scalars(step=elements % 5 + 1)
        expected = stepped(reference, values, numbers, options, rounding)
        others = {"triton": stepped(launch, values, numbers, options, rounding, DEVICE)} if elements < 5001 else {}
        others |= {"c++": stepped(in_cpp, values, numbers, options, rounding)} if cpu.library() else {}
        for side, results in others.items():
            for name, value in expected.items():
                assert value is None or torch.equal(results[name], value), (side, name, gradient_dtype)


@pytest.mark.parametrize(("side", "device"), [pytest.param(1, DEVICE, marks=run_kernels), (0, "cpu"),
                                              pytest.param(2, "cpu", marks=needs_compiler)])  # fmt: skip
def test_a_step_of_lion_is_its_formula_in_double_precision(side, device):
    values, numbers = state("lion", 3001, torch.bfloat16, ema=True, dtype=torch.float32), scalars()
    values["weights"] = torch.zeros(3001, dtype=torch.float16)
    results = stepped(SIDES["lion"][side], values, numbers, LION, None, device)
    master, momentum, gradient = (values[name].double() for name in ("master", "exp_avg", "gradient"))
    gradient *= float(numbers["factor"])
    update = (0.9 * momentum + 0.1 * gradient).sign()
    master -= 1e-2 * (update + 0.02 * master)
    torch.testing.assert_close(results["master"].double(), master, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(results["exp_avg"].double(), 0.99 * momentum + 0.01 * gradient, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(results["ema"].double(), values["ema"].double() * 0.75 + 0.25 * master, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(results["weights"].double(), master, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", SIDES)
def test_a_factor_of_zero_leaves_everything(kind):
    reference, launch, in_cpp, options = SIDES[kind]
    values = state(kind, 4500, torch.float32, ema=True)
    values["gradient"][3] = float("nan")
    for side, device in ((reference, "cpu"), (launch, DEVICE), (in_cpp, "cpu")):
        results = stepped(side, values, scalars(factor=0.0), options, torch.tensor([1, 0]), device)
        assert all(value is None or torch.equal(value[4:], values[name][4:]) for name, value in results.items())


def test_rounding_is_right_in_the_mean_and_keeps_what_bf16_holds():
    value = torch.full((2**16,), 1 + 2**-9)  # a quarter of the way from 1 to the next number of bf16
    rounded = reference_round(value, torch.arange(2**16))
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert float(rounded.double().mean()) == 1 + 2**-9
    held = torch.tensor([-3.0, 0.0, -0.0, 1e-30, 2.0**100]).bfloat16().float()
    for noise in (0, 65535):
        assert torch.equal(reference_round(held, torch.full((5,), noise)), held)
    words = reference_words(torch.tensor([SEED, 0]), torch.ones(1), 100_000)
    assert float((words & 0xFFFF).double().mean()) == pytest.approx(32767.5, rel=5e-3)
    assert len(words.unique()) > 99_990


def test_draws_depend_on_step_and_place_and_on_nothing_else():
    values, options = state("adamw", 9000, torch.bfloat16, ema=False), ADAMW
    results = {
        (step, place): stepped(adamw_ema_, values, scalars(step=step), options, torch.tensor([SEED, place]))["exp_avg"]
        for step in (3, 4) for place in (0, 1)
    }  # fmt: skip
    assert torch.equal(results[3, 0], stepped(adamw_ema_, values, scalars(step=3), options, torch.tensor([SEED, 0]))["exp_avg"])
    # A moment that is rounded otherwise, of one step apart or of other weights.
    for other in ((4, 0), (3, 1)):
        assert not torch.equal(results[3, 0], results[other])


@needs_compiler
def test_the_number_of_threads_does_not_show():
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            values = state("adamw", 100_001, torch.bfloat16, ema=True)
            results.append(stepped(adamw_ema_, values, scalars(), ADAMW, torch.tensor([SEED, 0])))
        finally:
            torch.set_num_threads(before)
    assert all(value is None or torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_torch_library_accepts_the_operations():
    for operation, kind in ((adamw_ema_, "adamw"), (lion_ema_, "lion")):
        values = [None if value is None else value.to(DEVICE) for value in state(kind, 100, torch.bfloat16, ema=True).values()]
        numbers = [number.to(DEVICE) for number in scalars().values()]
        options = SIDES[kind][3].values()
        torch.library.opcheck(operation, (*values, *numbers, *options, torch.tensor([SEED, 0], device=DEVICE)))
