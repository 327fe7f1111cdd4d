"""One of two processes: the bytes that DeepSpeed reduces in a step, as a line of JSON for each stage and way to run it."""

import itertools
import json
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from benchmarks.tools.traffic import Collectives
from engine.config.options import TrainConfig
from engine.loop.weights import zero_options
from engine.loop.weights.zero import ZeroPartition
from engine.processes import Processes


def count(config: TrainConfig, processes: Processes, captured: bool) -> tuple[int, float]:
    """Bytes that one step reduces, and the sum of this process's weights after it."""
    torch.manual_seed(0)
    partition = ZeroPartition(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)), config, processes, captured)
    generator = torch.Generator().manual_seed(processes.rank)
    weight = partition.parameters[0].dtype
    with Collectives() as collectives:
        partition.begin(1, 1.0)
        for number in range(config.gradient_accumulation_steps):
            first, last = number == 0, number == config.gradient_accumulation_steps - 1
            if captured:
                gradients = [torch.randn(shape, generator=generator).to(weight) for shape in partition.shapes.values()]
                partition.receive(gradients, first)
            else:
                prediction = partition.predict(torch.randn(4, 20, generator=generator).to(weight))
                partition.backward(prediction, torch.randn(prediction.shape, generator=generator).to(weight), first)
            partition.update(last)
    return collectives.reduced, sum(float(master.detach().double().sum()) for master in partition.masters)


def main(arguments: list[str]) -> None:
    """Arguments: what is printed by the first process goes to a file; DeepSpeed's own options lie in another."""
    file, theirs = arguments
    processes = Processes().connect()
    get_accelerator().is_fp16_supported = lambda: True  # on a CPU too, as far as this model needs
    ways = [*itertools.product((1, 2), (True, False), ("none",)), (3, False, "none"), (1, False, "cpu"), (2, False, "cpu")]
    for precision, (stage, captured, offload), steps in itertools.product(("bf16", "fp16"), ways, (1, 2)):
        config = TrainConfig(
            family="sd", pretrained_model_name_or_path="unused", mixed_precision=precision, zero_stage=stage,
            gradient_accumulation_steps=steps, offload_optimizer=offload,
        )  # fmt: skip
        of_a_file = config.model_copy(update={"deepspeed_config": theirs})
        row = {"precision": precision, "stage": stage, "captured": captured, "offload": offload, "micro_batches": steps}
        cases = [("above", 2, config), ("below", 3, config), ("file", 2, of_a_file)]
        for name, threshold, given in cases if (precision, steps) == ("bf16", 2) else cases[:1]:
            zero_options.FP32_REDUCTION = threshold
            row[name], row[f"{name}_weights"] = count(given, processes, captured)
        if processes.is_first:
            with Path(file).open("a") as output:
                print(json.dumps(row), file=output)
    processes.close()


if __name__ == "__main__":
    main(sys.argv[1:])
