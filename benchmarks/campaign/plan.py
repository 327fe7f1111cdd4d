"""The parts of a campaign, in their order; every time is an estimate, but for rows that were measured."""

import re
from dataclasses import dataclass, replace

from benchmarks.tools.levers import SHIPPED, Lever
from benchmarks.tools.planned import LARGER, SECONDS, levers_of

LEAST = 60  # seconds that a part must have to go on


@dataclass(frozen=True)
class Part:
    """A question, and the process that answers it.

    python: arguments of the interpreter.
    tiny: the same for a rehearsal, with small models on a CPU.
    seconds: how long it should take on an H100; an estimate, from what `assumption` says.
    limit: seconds without a new row after which it is killed.
    measures: keeps its rows in a file (`--json`).
    resumes: begins no row that would not end in time (`--minutes`), and goes on from its last row.
    needs: packages without which it is skipped.
    predicted: what docs/performance.md expects.
    memory: GiB of the card that it takes at most, by count; runs beside others where these fit the card together. None for what
        is timed, and has the machine for itself.
    checkpoint, levers: whose rows of `benchmarks.steps.step` it measures.
    local: what it leaves lies in `--scratch`, and says nothing of another machine or commit.
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
    memory: float | None = None
    checkpoint: str = ""
    levers: tuple[Lever, ...] = ()
    local: bool = False

    @property
    def slug(self) -> str:
        return re.sub(r"\W+", "-", self.name.lower()).strip("-")

    @property
    def least(self) -> float:
        """Seconds of a call without which it does not begin."""
        return min(self.limit, min(LEAST, self.seconds) if self.resumes else self.seconds)

    @property
    def benchmark(self) -> str:
        """The question's module, without its package; its own name for code of its own."""
        return self.python[1].rpartition(".")[2] if self.python[0] == "-m" else self.slug

    @property
    def key(self) -> str:
        """Of its rows: those that are timed share them by benchmark, so that none measures what another has."""
        return self.benchmark if self.memory is None else self.slug


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return "-m", f"benchmarks.{name}", *arguments


TIMED = "What does each lever give, and how far is the recipe?"


def waterfall(name: str, checkpoint: str, family: str, *few: str) -> Part:
    """The planned levers of a checkpoint; in a rehearsal, of its family's tiny model, those named in `few`."""
    levers = levers_of(checkpoint, family)
    return Part(
        f"step, {name}", TIMED,
        module("steps.step", "--warm", "--checkpoints", checkpoint, "--levers", *(lever.name for lever in levers)),
        module("steps.step", "--checkpoints", family, "--levers", *few),
        15 + sum(SECONDS[lever.name] for lever in levers),
        "15 s of imports, 13 to 35 s a row, with compiled code in the caches", limit=420,
        predicted="see the comparison below", checkpoint=checkpoint, levers=levers,
    )  # fmt: skip


def larger(name: str, checkpoint: str, tiny: str) -> Part:
    """What ships, at a larger batch."""
    size = LARGER[checkpoint]
    return Part(
        f"batch {size}, {name}", "What does a larger batch give?",
        module("steps.step", "--warm", "--checkpoints", checkpoint, "--levers", SHIPPED.name, "--batch", str(size)),
        module("steps.step", "--checkpoints", tiny, "--levers", "captured", "--batch", "2"), 15 + SECONDS[SHIPPED.name],
        "as the row of the smaller batch", limit=420, predicted="5 % and less",
    )  # fmt: skip


def curves(name: str, checkpoint: str, tiny: str, memory: float, seconds: float) -> Part:
    """A family in bf16, captured and compiled, beside fp32: compilation first, which leaves the GPU to the other families."""
    sides = ("--sides", "bf16, captured", "fp32, eager")
    return Part(
        f"curves in bf16, {name}", "Does a step in bf16, captured, learn as one in fp32, eager?",
        module("steps.curves", "--checkpoints", checkpoint, *sides),
        module("steps.curves", "--checkpoints", tiny, "--steps", "6", *sides), seconds,
        "15 s to open each side, torch.compile, 200 steps at 96 and 45 TFLOP/s, on a GPU that the other families use too",
        limit=540, predicted="a difference within noise", memory=memory,
    )  # fmt: skip


def curves_in_fp8(name: str, checkpoint: str, memory: float | None, seconds: float, *how: str) -> Part:
    return Part(
        f"curves in fp8, {name}", "Does a step with fp8 matrix products learn as one in bf16?",
        module("steps.curves", "--checkpoints", checkpoint, *how),
        module("steps.curves", "--checkpoints", "kandinsky-prior", "--steps", "6", "--sides", "bf16, captured", "--batch", "2"),
        seconds, "as above, without fp32", limit=540, needs=("torchao",),
        predicted="a difference within noise", memory=memory,
    )  # fmt: skip


# Those that need no quiet machine first, of which as many as the card's memory holds run beside each other.
PLAN = [
    Part(
        "gpu tests", "Do the tests that need a GPU, and those of the kernels and graphs, pass?",
        module("campaign.gpu_tests"), module("campaign.gpu_tests", "--suites", "small"), 250,
        "150 s alone, 60 for what is marked gpu and 45 each for the tests of kernels and graphs, by 8 processes", limit=480,
        memory=14,
    ),
    Part(
        "host waits", "Does a step of one process make the host wait for the GPU?",
        module("steps.host_waits"), module("steps.host_waits", "--families", "kandinsky-prior"), 90,
        "60 s alone: 8 trainings of 12 small steps, 5 s each with the encoding of their images, and 20 s of imports",
        predicted="no wait between two lines of metrics", memory=2,
    ),
    Part(
        "compilation", "How long does torch.compile take for all that is compiled?", module("steps.compilation"),
        module("steps.compilation", "--processes", "1", "--checkpoints", "kandinsky-prior", "--levers", SHIPPED.name), 430,
        "24 processes of 30 to 150 s each with idle cores, one of three samplings, 8 at once on 16 that have other "
        "work; fills the caches of --scratch; 19 GiB for a pipeline that is drawn in fp32, and 7 times 5 for models",
        limit=420, memory=54, local=True,
    ),
    curves("Wuerstchen prior", "Wuerstchen v2 prior, 768 px", "wuerstchen", 31, 370),
    curves("Kandinsky prior", "Kandinsky 2.2 prior", "kandinsky-prior", 24, 290),
    Part(
        "captured against uncaptured", "Do captured steps train as uncaptured ones, bit for bit?",
        module("steps.equality"),
        module("steps.equality", "--families", "kandinsky-prior", "--modes", "eager", "--steps", "2"), 130,
        "90 s alone: 8 pairs of trainings of 20 small steps, 9 s a pair, and 20 s of imports",
        predicted="equal, under --deterministic", memory=3,
    ),
    Part(
        "ZeRO 1 and 2", "Do both stages train in a world of one, captured as uncaptured?",
        module("steps.equality", "--modes", "ZeRO 1", "ZeRO 2"),
        module("steps.equality", "--families", "kandinsky-prior", "--modes", "ZeRO 1", "ZeRO 2", "--steps", "2"), 170,
        "120 s alone: 16 trainings of 20 small steps, 6 s each, and 15 s of imports", needs=("deepspeed",),
        predicted="equal, under --deterministic", memory=3,
    ),
    Part(
        "compiled against captured", "Do compiled steps train captured as uncaptured, bit for bit?",
        module("steps.equality", "--modes", "compiled"),
        module("steps.equality", "--families", "kandinsky-prior", "--modes", "compiled", "--steps", "2"), 300,
        "260 s alone: 4 pairs of trainings, 60 s each with two compilations of a small model, and 20 s of imports",
        predicted="equal, under --deterministic", memory=3,
    ),
    curves("Kandinsky decoder", "Kandinsky 2.2 decoder, 512 px", "kandinsky-decoder", 26, 320),
    curves("SD 1.5", "SD 1.5, 512 px", "sd", 22, 300),
    curves_in_fp8("Kandinsky prior", "Kandinsky 2.2 prior", 20, 130, "--sides", "fp8, captured"),
    waterfall("SD 1.5 at 512 px", "SD 1.5, 512 px", "sd", "recipe, cached", "compiled and captured"),
    waterfall("Kandinsky decoder at 768 px", "Kandinsky 2.2 decoder, 768 px", "kandinsky-decoder", "engine"),
    waterfall("Wuerstchen prior", "Wuerstchen v2 prior, 768 px", "wuerstchen", "captured"),
    waterfall("Kandinsky prior", "Kandinsky 2.2 prior", "kandinsky-prior", "recipe", "compiled and captured"),
    larger("SD 1.5", "SD 1.5, 512 px", "sd"),
    larger("Kandinsky decoder", "Kandinsky 2.2 decoder, 768 px", "kandinsky-decoder"),
    larger("Wuerstchen prior", "Wuerstchen v2 prior, 768 px", "wuerstchen"),
    larger("Kandinsky prior", "Kandinsky 2.2 prior", "kandinsky-prior"),
    waterfall("Kandinsky decoder at 512 px", "Kandinsky 2.2 decoder, 512 px", "kandinsky-decoder", "recipe, cached"),
    Part(
        "kernels", "What do the fused operations gain over eager torch and torch.compile?",
        module("operations.kernels"), module("operations.kernels", "--small"), 225,
        "105 rows of 2 s, and 15 s of imports, with compiled code in the caches",
        predicted="bytes against a copy's: `add_noise` 34 %, `diffusion_loss` 20 to 40 %, `group_norm_silu` 50 to 65 % "
        "(8 x 8: 25 %), `gelu_response_norm` 80 %, `square_sum` 85 % and more",
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
        "sampling", "How fast are images drawn, and where does the time go?",
        module("sample", "--no_counts"),
        module("sample", "--size", "tiny", "--families", "sd", "--images", "1", "--steps", "2"), 120,
        "15 s of imports; per family 12 s to draw weights, 16 calls of 10 steps for 4 images, 0.7 to 2 s each", limit=420,
        predicted="compiled at 4 images: up to 1.9 times for Wuerstchen, 1.4 for SD and 1.3 for Kandinsky, by count",
    ),
    Part(
        "loader", "How fast does the loader make batches beside a GPU's host?",
        module("data.loader", "--records", "100000", "--batch", "16"),
        module("data.loader", "--records", "500", "--batch", "16"), 40,
        "10 s of writing and 10 s of reading", predicted="20,000 samples per second at batch 16 on two cores",
    ),
    Part(
        "overhead", "How long does the GPU wait between two replays?",
        module("steps.overhead"), module("steps.overhead", "--steps", "50"), 55,
        "15 s of imports, 40 s as a compiled row with compiled code in the caches",
        predicted="under 2 % of a captured step of SD 1.5 at batch 8",
    ),
    # Products in fp8 need batches of 16, four times those of its other curves: with a card for itself.
    curves_in_fp8("Wuerstchen prior", "Wuerstchen v2 prior, 768 px", None, 400, "--sides", "bf16, captured", "fp8, captured",
                  "--batch", "16"),
    Part(
        "whole runs", "What does a user gain over the diffusers recipe, from files to files?",
        module("runs.recipe", "--full_size", "--steps", "40", "--rounds", "2"),
        module("runs.recipe", "--tiny", "sd", "--steps", "10", "--rounds", "1"), 1020,
        "60 s to write 4 GB of weights; two turns of each side, of 110 s and, from cold caches, 150 s of torch.compile for two "
        "of them", limit=480,
        predicted="as the waterfall's rows with encoders in the loop, less what loading images costs the recipe",
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

    def small(part: Part) -> Part:
        return replace(part, python=part.tiny, seconds=10, assumption="small", needs=(), memory=part.memory and 1)

    tiny = list(map(small, PLAN))
    return [*tiny[:2], *PROVOKED, *tiny[2:]]
