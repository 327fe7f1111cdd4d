"""engine::adamw_ema_ and engine::square_sum: kernel, C++ and reference against double precision, and under torch.library."""

import pytest
import torch

from engine.kernels import adamw_ema_, cpu, square_sum
from engine.kernels.adamw_ema import launch_adamw_ema_, reference_adamw_ema_
from engine.kernels.square_sum import launch_square_sum, reference_square_sum
from tests.kernels.cases import DEVICE, DTYPES, run_kernels

OPTIONS = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "weight_decay": 0.02}
SIDES = [
    pytest.param(launch_adamw_ema_, id="triton", marks=run_kernels),
    pytest.param(reference_adamw_ema_, id="reference"),
    pytest.param(cpu.run_adamw_ema_, id="c++", marks=pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")),
]
# Around the ends of vectors (8 elements) and blocks (1024).
COUNTS = [1, 7, 8, 9, 16, 1023, 1024, 1025, 1032, 2050]


def state(elements: int, gradient_dtype: torch.dtype, weights_dtype: torch.dtype | None, ema: bool) -> dict:
    generator = torch.Generator().manual_seed(elements)

    def draw() -> torch.Tensor:
        return torch.randn(elements, generator=generator)

    return {
        "master": draw(), "exp_avg": 0.1 * draw(), "exp_avg_sq": 0.01 * draw().square(), "gradient": draw().to(gradient_dtype),
        "weights": None if weights_dtype is None else torch.zeros(elements, dtype=weights_dtype),
        "ema": draw() if ema else None,
    }  # fmt: skip


def scalars(factor: float = 0.37, step: float = 3, rate: float = 1e-2, ema_weight: float = 0.25) -> dict:
    return {"learning_rate": torch.tensor([rate]), "factor": torch.tensor([factor]), "step": torch.tensor([float(step)]),
            "ema_weight": torch.tensor([ema_weight])}  # fmt: skip


def expected(values: dict, numbers: dict) -> dict[str, torch.Tensor]:
    """The step in double precision, from torch's own AdamW."""
    master = values["master"].double().requires_grad_()
    optimizer = torch.optim.AdamW(
        [master], lr=float(numbers["learning_rate"]), betas=(OPTIONS["beta_1"], OPTIONS["beta_2"]), eps=OPTIONS["epsilon"],
        weight_decay=OPTIONS["weight_decay"],
    )  # fmt: skip
    optimizer.state[master] = {
        "step": torch.tensor(float(numbers["step"]) - 1), "exp_avg": values["exp_avg"].double(),
        "exp_avg_sq": values["exp_avg_sq"].double(),
    }  # fmt: skip
    master.grad = values["gradient"].double() * float(numbers["factor"])
    optimizer.step()
    result = {"master": master.detach(), **{kind: optimizer.state[master][kind] for kind in ("exp_avg", "exp_avg_sq")}}
    if values["ema"] is not None:
        ema = values["ema"].double()
        result["ema"] = ema + float(numbers["ema_weight"]) * (result["master"] - ema)
    return result


def on_device(values: dict, side=None) -> dict:
    """Copies of the values where a side computes: the C++ always on the CPU."""
    device = "cpu" if side is cpu.run_adamw_ema_ else DEVICE
    return {name: None if value is None else value.clone().to(device) for name, value in values.items()}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize(("weights_dtype", "ema"), [(None, False), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("elements", [1, 1023, 5000])
def test_a_step_is_that_of_adamw_in_double_precision(side, step, gradient_dtype, weights_dtype, ema, elements):
    values, numbers = state(elements, gradient_dtype, weights_dtype, ema), scalars(step=step)
    results = on_device(values, side)
    side(*results.values(), *on_device(numbers, side).values(), *OPTIONS.values())
    for name, exact in expected(values, numbers).items():
        torch.testing.assert_close(results[name].cpu().double(), exact, rtol=2e-6, atol=2e-7, msg=name)
    if weights_dtype is not None:
        # Triton's interpreter cuts bf16 off instead of rounding it.
        bits = 7 if weights_dtype == torch.bfloat16 else 10
        torch.testing.assert_close(results["weights"].float(), results["master"], rtol=2.0**-bits, atol=1e-7)
    assert torch.equal(results["gradient"].cpu(), values["gradient"])


@run_kernels
@pytest.mark.parametrize("begin", [8, 5], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("elements", COUNTS)
def test_a_step_ends_with_the_last_element(elements, begin):
    """Views into larger buffers, as a partition may be: what lies around them keeps its bits."""
    values, numbers = state(elements, torch.bfloat16, torch.float16, ema=True), scalars()
    buffers = {name: torch.full((elements + 32,), 7.0, dtype=value.dtype) for name, value in values.items()}
    for name, value in values.items():
        buffers[name][begin : begin + elements] = value
    results = on_device(buffers)
    launch_adamw_ema_(
        **{name: buffer[begin : begin + elements] for name, buffer in results.items()}, **on_device(numbers), **OPTIONS
    )
    reference_adamw_ema_(**values, **numbers, **OPTIONS)
    for name, result in results.items():
        around, part = buffers[name], slice(begin, begin + elements)
        tolerance = 1e-3 if name == "weights" else 2e-6
        torch.testing.assert_close(result.cpu()[part], values[name], rtol=tolerance, atol=2e-7)
        around[part] = result.cpu()[part]
        assert torch.equal(result.cpu(), around), name


@run_kernels
@pytest.mark.parametrize("elements", COUNTS)
def test_a_square_sum_takes_every_element_and_no_neighbour(elements):
    buffer = torch.full((elements + 32,), float("nan"), device=DEVICE)
    for begin in (8, 5):
        part = buffer[begin : begin + elements].copy_(torch.arange(1, elements + 1) % 7)
        exact = (torch.arange(1, elements + 1) % 7).square().sum()
        assert float(launch_square_sum(part)) == float(exact)
        part.fill_(float("nan"))


@pytest.mark.parametrize("side", SIDES)
def test_a_factor_of_zero_leaves_everything(side):
    values = state(1500, torch.float32, torch.bfloat16, ema=True)
    values["gradient"][3] = float("nan")
    results = on_device(values, side)
    side(*results.values(), *on_device(scalars(factor=0.0), side).values(), *OPTIONS.values())
    for name, before in values.items():
        torch.testing.assert_close(results[name].cpu(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_the_number_of_threads_does_not_show():
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            values = state(100_001, torch.bfloat16, torch.bfloat16, ema=True)
            adamw_ema_(**values, **scalars(), **OPTIONS)
            results.append(values)
        finally:
            torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_torch_library_accepts_the_operations():
    values = on_device(state(100, torch.bfloat16, torch.bfloat16, ema=True))
    torch.library.opcheck(adamw_ema_, (*values.values(), *on_device(scalars()).values(), *OPTIONS.values()))
    torch.library.opcheck(square_sum, (torch.randn(100, device=DEVICE),))


def test_a_square_sum_keeps_its_digits_over_many_elements():
    many = torch.randn(2**26, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = sum(float(part.double().square().sum()) for part in many.split(2**20))
    assert float(square_sum(many.to(DEVICE))) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("side", [pytest.param(launch_square_sum, id="triton", marks=run_kernels),
                                  pytest.param(reference_square_sum, id="reference")])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 1000, 8192, 40_001])
def test_square_sums_are_those_of_double_precision(side, dtype, elements):
    tensor = torch.randn(elements, generator=torch.Generator().manual_seed(elements)).to(dtype)
    result = side(tensor.to(DEVICE))
    assert result.shape == (1,)
    torch.testing.assert_close(result.cpu().double(), tensor.double().square().sum().view(1), rtol=2e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [pytest.param(launch_square_sum, id="triton", marks=run_kernels),
                                  pytest.param(reference_square_sum, id="reference")])  # fmt: skip
def test_a_sum_with_a_value_that_is_not_finite_is_not(side, value):
    tensor = torch.ones(3000, device=DEVICE)
    tensor[2900] = value
    assert not bool(side(tensor).isfinite())
