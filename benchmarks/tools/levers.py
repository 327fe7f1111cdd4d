"""The levers of a training step's speed: the diffusers recipe, the engine, each with what the one before has, up to what ships;
and levers that take one thing from what ships."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

from engine.config.options import TrainConfig
from engine.config.schema import options_lacking

if TYPE_CHECKING:
    from engine.models.training_form import Form

CONVOLUTIONAL = ("sd", "kandinsky-decoder", "wuerstchen")
NORMALISED = ("sd", "kandinsky-decoder")  # with group normalisation
ACTIVATED = ("sd", "kandinsky-prior", "wuerstchen")  # by GELU, between linear layers
TRANSFORMERS = ("kandinsky-prior", "wuerstchen")


@dataclass(frozen=True)
class Lever:
    """What is measured: the recipe, or the engine with options of its command line.

    options: of the engine; None for the recipe.
    encoders: images and captions are encoded in every step.
    best: the recipe with what no script has.
    projections, norms, activations: of the training form, where they differ from what ships.
    cudnn_benchmark: likewise.
    families: that have what the lever changes; none for all.
    """

    name: str
    options: dict[str, Any] | None = None
    encoders: bool = False
    best: bool = False
    projections: bool | None = None
    norms: bool | None = None
    activations: bool | None = None
    cudnn_benchmark: bool | None = None
    families: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What it sets, to be kept beside what was measured."""
        unset = (None, False, ())
        return {name: value for name, value in asdict(self).items() if name not in ("name", "families") and value not in unset}

    @property
    def compiles(self) -> bool:
        return self.best or bool(self.options and self.options.get("compile"))

    @property
    def form(self) -> tuple[Any, ...]:
        """What torch.compile makes anew: the same again comes from its cache."""
        options = {name: value for name, value in (self.options or {}).items() if name != "cuda_graphs"}
        return self.best, self.options is None, sorted(options.items()), self.training_form

    @property
    def training_form(self) -> Form:
        from engine.models.training_form import SHIPPED, Form  # here, because a campaign's own process imports no libraries

        return Form(
            SHIPPED.norms_when_compiled if self.norms is None else self.norms,
            SHIPPED.projections if self.projections is None else self.projections,
            SHIPPED.activations_when_compiled if self.activations is None else self.activations,
        )

    def fits(self, family: str) -> bool:
        """Whether a family has what the lever changes, and this engine its options."""
        lacking = options_lacking(TrainConfig, family)
        known = TrainConfig.model_fields
        return (not self.families or family in self.families) and all(
            name in known and name not in lacking and (isinstance(value, bool) or value in _choices(known[name].annotation))
            for name, value in (self.options or {}).items()
        )


def _choices(annotation: Any) -> list[Any]:
    """The values of a `Literal`, also where None is another."""
    return [value for part in (annotation, *get_args(annotation)) for value in get_args(part)]


UNCAPTURED = {"cuda_graphs": "off"}
EAGER = Lever("stacked projections", UNCAPTURED, cudnn_benchmark=False)
SHIPPED = Lever("compiled and captured", {"compile": True})
LEVERS = [
    Lever("recipe", encoders=True),
    Lever("recipe at its best", encoders=True, best=True),
    Lever("recipe, cached"),
    Lever("recipe at its best, cached", best=True),
    # bf16 weights, channels last, and fused noise, loss, norms and AdamW.
    Lever("engine", UNCAPTURED, projections=False, cudnn_benchmark=False),
    EAGER,
    Lever("cuDNN's search", UNCAPTURED, cudnn_benchmark=True, families=CONVOLUTIONAL),
    Lever("captured", {}),
    Lever("compiled", {"compile": True, **UNCAPTURED}),
    SHIPPED,
    # Each beside what ships: inductor's kernels, or torch's, in the place of ours.
    Lever("compiled, plain norms", {"compile": True}, norms=False, families=NORMALISED),
    Lever("compiled, plain activations", {"compile": True}, activations=False, families=ACTIVATED),
    Lever("compiled, torch's attention", {"compile": True, "attention": "cudnn"}, families=("kandinsky-prior",)),
    # Beside "captured", since no kernel of attention needs torch.compile, and each would compile the model anew.
    *(Lever(f"captured, {kind} attention", {"attention": kind}) for kind in ("cudnn", "flash", "efficient")),
    Lever("max-autotune", {"compile": True, "compile_mode": "max-autotune-no-cudagraphs"}),
    Lever("fp8 matrix products", {"compile": True, "matrix_precision": "fp8"}, families=TRANSFORMERS),
]
