"""What a campaign measures of a training step: names of levers (`benchmarks.tools.levers`) by checkpoint."""

# Each where the family has what it changes.
LEVERS = (
    "recipe", "recipe, cached", "recipe at its best, cached", "engine", "captured", "compiled and captured",
    "compiled, plain norms", "compiled, plain activations", "compiled, torch's attention", "fp8 matrix products",
)  # fmt: skip
_FEW = {"Kandinsky 2.2 decoder, 512 px": ("recipe", "compiled and captured")}  # the same model as at 768 px
# Checkpoint -> a batch at which what ships is measured too, for which the recipe may lack memory: the optimizer takes a smaller
# share of a step.
LARGER = {
    "SD 1.5, 512 px": 64,
    "Kandinsky 2.2 decoder, 768 px": 32,
    "Wuerstchen v2 prior, 768 px": 32,
    "Kandinsky 2.2 prior": 256,
}
SMALL_BATCH = 8  # of SD 1.5 in `benchmarks.steps.overhead`


def levers_of(checkpoint: str) -> tuple[str, ...]:
    return _FEW.get(checkpoint, LEVERS)
