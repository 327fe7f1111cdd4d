"""What a campaign measures of a training step: levers (`benchmarks.tools.levers`) by checkpoint."""

from benchmarks.tools.levers import LEVERS, Lever

# Lever -> seconds of its row with compiled code in the caches, where none was measured; an estimate, from rows of others.
SECONDS = {
    "recipe": 30, "recipe, cached": 13, "recipe at its best, cached": 35, "engine": 13, "captured": 20,
    "compiled and captured": 30, "compiled, plain norms": 30, "compiled, plain activations": 30,
    "compiled, torch's attention": 30, "fp8 matrix products": 30,
}  # fmt: skip
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


def levers_of(checkpoint: str, family: str) -> tuple[Lever, ...]:
    """What is measured of a checkpoint, where its family has what the lever changes."""
    names = _FEW.get(checkpoint, tuple(SECONDS))
    return tuple(lever for lever in LEVERS if lever.name in names and lever.fits(family))
