"""The parts of a campaign, in the order of what they tell; no part has run on a GPU yet, so that every time is an estimate."""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Part:
    """A question, and the process that answers it.

    python: arguments of the interpreter.
    tiny: the same for a rehearsal, with small models on a CPU.
    seconds: how long it should take on an H100 with cold caches; an estimate, from what `assumption` says.
    limit: seconds without a new row after which it is killed.
    measures: keeps its rows in a file (`--json`).
    resumes: begins no row that would not end in time (`--minutes`), and goes on from its last row.
    needs: packages without which it is skipped.
    predicted: what docs/performance.md expects.
    """

    name: str
    question: str
    python: tuple[str, ...]
    tiny: tuple[str, ...]
    seconds: float
    assumption: str
    limit: float = 300
    measures: bool = True
    resumes: bool = True
    needs: tuple[str, ...] = ()
    predicted: str = ""

    @property
    def slug(self) -> str:
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")

    @property
    def benchmark(self) -> str:
        """The question's module, without its package; its own name for code of its own."""
        return self.python[1].rpartition(".")[2] if self.python[0] == "-m" else self.slug


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return "-m", f"benchmarks.{name}", *arguments


FIRST_LOOK = ("recipe", "recipe, cached", "captured", "compiled and captured")


def waterfall(name: str, checkpoint: str, tiny: str, seconds: float, *few: str) -> Part:
    """All levers of a checkpoint; in a rehearsal, of a tiny family, those named in `few`."""
    return Part(
        f"step, {name}", "What does each lever give, and how far is the recipe?",
        module("steps.step", "--checkpoints", checkpoint, "--without", "max-autotune"),
        module("steps.step", "--checkpoints", tiny, "--levers", *few), seconds,
        "the sum of the rows' own estimates (`benchmarks.steps.step.expected_seconds`), without max-autotune", limit=420,
        predicted="see the comparison below",
    )  # fmt: skip


PLAN = [
    Part(
        "gpu tests", "Do the tests that need a GPU, and those of the kernels and graphs, pass?",
        module("campaign.gpu_tests"), module("campaign.gpu_tests", "--suites", "small"), 150,
        "60 s for what is marked gpu, 45 s each for the tests of kernels and graphs, by 8 processes", limit=240,
    ),
    Part(
        "host waits", "Does a step of one process make the host wait for the GPU?",
        module("steps.host_waits"), module("steps.host_waits", "--families", "kandinsky-prior"), 60,
        "8 trainings of 12 small steps, 5 s each with the encoding of their images, and 20 s of imports",
        predicted="no wait between two lines of metrics",
    ),
    Part(
        "captured against uncaptured", "Do captured steps train as uncaptured ones, bit for bit?",
        module("steps.equality"),
        module("steps.equality", "--families", "kandinsky-prior", "--modes", "eager", "--steps", "2"), 90,
        "8 pairs of trainings of 20 small steps, 9 s a pair, and 20 s of imports", predicted="equal, under --deterministic",
    ),
    Part(
        "first look", "How fast is each model as it ships, beside the recipe?",
        module("steps.step", "--levers", *FIRST_LOOK),
        module("steps.step", "--checkpoints", "sd", "--levers", "recipe, cached", "engine"), 1740,
        "the sum of the rows' own estimates (`benchmarks.steps.step.expected_seconds`), with torch.compile from cold caches",
        limit=420, predicted="see the comparison below",
    ),
    waterfall("SD 1.5 at 512 px", "SD 1.5, 512 px", "sd", 1166, "compiled and captured"),
    waterfall("Kandinsky prior", "Kandinsky 2.2 prior", "kandinsky-prior", 958, "recipe", "compiled and captured"),
    waterfall("Wuerstchen prior", "Wuerstchen v2 prior, 768 px", "wuerstchen", 904, "captured"),
    waterfall("Kandinsky decoder at 512 px", "Kandinsky 2.2 decoder, 512 px", "kandinsky-decoder", 1405, "recipe, cached",
              "captured"),
    waterfall("Kandinsky decoder at 768 px", "Kandinsky 2.2 decoder, 768 px", "kandinsky-decoder", 1437, "engine"),
    Part(
        "kernels", "What do the fused operations gain over eager torch and torch.compile?",
        module("operations.kernels"), module("operations.kernels", "--small"), 200,
        "33 rows of 2 s, and 22 compilations of small functions of 5 s, in parallel processes",
        predicted="bytes against a copy's: `add_noise` 34 %, `diffusion_loss` 20 to 40 %, `group_norm_silu` by its "
        "instructions, `gelu_response_norm` 80 %, `square_sum` 85 % and more",
    ),
    Part(
        "optimizer", "What does one pass over the optimizer's state gain?",
        module("operations.optimizer"), module("operations.optimizer", "--parameters", "100000"), 40,
        "15 s of imports and memory, 15 s of torch.compile",
        predicted="85 % and more of a copy's bandwidth; 62 bytes per parameter become 36: 5 ms per step for SD 1.5",
    ),
    Part(
        "attention backends", "Which kernels run the families' attention fastest?",
        module("operations.attention"), module("operations.attention", "--checkpoints", "kandinsky-prior"), 60,
        "some 30 rows of 1 s, and 15 s of imports",
        predicted="cuDNN 1.7 to 2.3 times Flash on Hopper, as others say of it",
    ),
    Part(
        "ZeRO 1 and 2", "Do both stages train in a world of one, captured as uncaptured?",
        module("steps.equality", "--modes", "ZeRO 1", "ZeRO 2"),
        module("steps.equality", "--families", "kandinsky-prior", "--modes", "ZeRO 1", "ZeRO 2", "--steps", "2"), 120,
        "16 trainings of 20 small steps, 6 s each, and 15 s of imports", needs=("deepspeed",),
        predicted="equal, under --deterministic",
    ),
    Part(
        "compiled against captured", "Do compiled steps train captured as uncaptured, bit for bit?",
        module("steps.equality", "--modes", "compiled"),
        module("steps.equality", "--families", "kandinsky-prior", "--modes", "compiled", "--steps", "2"), 260,
        "4 pairs of trainings, 60 s each with two compilations of a small model, and 20 s of imports",
        predicted="equal, under --deterministic",
    ),
    Part(
        "curves in bf16", "Does a step in bf16, captured, learn as one in fp32, eager?",
        module("steps.curves"), module("steps.curves", "--checkpoints", "kandinsky-prior", "wuerstchen", "--steps", "6"), 1300,
        "eight sides of 15 s to open; 200 steps at 40 TFLOP/s in fp32 and 96 in bf16: 350 s; torch.compile from cold caches: "
        "830 s", limit=420,
        predicted="a difference within noise",
    ),
    Part(
        "curves in fp8", "Does a step with fp8 matrix products learn as one in bf16?",
        module("steps.curves", "--checkpoints", "Kandinsky 2.2 prior", "Wuerstchen v2 prior, 768 px", "--sides",
               "bf16, captured", "fp8, captured"),
        module("steps.curves", "--checkpoints", "kandinsky-prior", "--steps", "4", "--sides", "bf16, captured"),
        990, "as above without fp32, four compiled sides", limit=420, needs=("torchao",), predicted="a difference within noise",
    ),
    Part(
        "sampling", "How fast are images drawn, and where does the time go?",
        module("sample"), module("sample", "--size", "tiny", "--families", "sd", "--images", "1", "--steps", "2"), 760,
        "20 s of counts; per family 30 s to draw weights, 21 calls of 25 steps for 4 images, 2 to 6 s each, and 60 s of "
        "torch.compile", limit=420,
        predicted="compiled at 4 images: up to 1.9 times for Wuerstchen, 1.4 for SD and 1.3 for Kandinsky, by count",
    ),
    Part(
        "whole runs", "What does a user gain over the diffusers recipe, from files to files?",
        module("runs.recipe", "--full_size", "--steps", "40", "--rounds", "2"),
        module("runs.recipe", "--tiny", "sd", "--steps", "10", "--rounds", "1"), 1020,
        "60 s to write 4 GB of weights; two turns of each side, of 110 s and, from cold caches, 150 s of torch.compile for two "
        "of them", limit=480,
        predicted="as the waterfall's rows with encoders in the loop, less what loading images costs the recipe",
    ),
    Part(
        "loader", "How fast does the loader make batches beside a GPU's host?",
        module("data.loader", "--records", "100000", "--batch", "16"),
        module("data.loader", "--records", "500", "--batch", "16"), 40,
        "10 s of writing and 10 s of reading", predicted="20,000 samples per second at batch 16 on two cores",
    ),
    Part(
        "overhead", "How long does the GPU wait between two replays?",
        module("steps.overhead"), module("steps.overhead", "--steps", "50"), 190,
        "170 s of torch.compile from cold caches, 15 s to open SD 1.5",
        predicted="under 2 % of a captured step of SD 1.5 at batch 8",
    ),
    Part(
        "max-autotune", "What does searching for the fastest kernels give SD 1.5?",
        module("steps.step", "--checkpoints", "SD 1.5, 512 px", "--levers", "max-autotune"),
        module("steps.step", "--checkpoints", "kandinsky-prior", "--levers", "max-autotune"), 950,
        "five times torch.compile's time from cold caches; begun only in a call that is long enough", limit=1500, resumes=False,
    ),
]  # fmt: skip


def provoked(name: str, code: str, limit: float = 60) -> Part:
    """A part of rehearsals that fails on purpose."""
    return Part(
        f"provoked: {name}",
        "Does this cost only itself?",
        ("-c", code),
        (),
        1,
        "ends at once",
        limit,
        measures=False,
        resumes=False,
    )


PROVOKED = [
    provoked("a crash", "import os, signal; print('about to crash', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
    provoked("a hang", "import time; print('about to hang', flush=True); time.sleep(3600)", limit=2),
    provoked("out of memory", "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')"),
    provoked("an exception", "raise ValueError('provoked')"),
]


def rehearsal() -> list[Part]:
    """The plan for a CPU, with failures on purpose between its parts."""
    tiny = [replace(part, python=part.tiny, seconds=10, assumption="small", needs=()) for part in PLAN]
    return [*tiny[:2], *PROVOKED, *tiny[2:]]
