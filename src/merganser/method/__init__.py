"""The whole framework for authors of merge methods.

A merge method is a plain function over tensors, in one file whose name is the function's name and the recipe's value:

    @merge_method(family="task vectors", cite="ilharco2023task")
    def task_arithmetic(base: Tensor, models: list[Tensor], *, weight: PerModel[Weight] = default(1.0)) -> Tensor: ...

The signature is the contract. Positional names say what is handed in:

    base      the base tensor; annotate `Tensor | None` where a base is optional
    models    the other tensors, in the order of the recipe
    rng       a `Random`: counter-based draws, the same on any machine layout
    NAME      the statistic declared as `statistics={"NAME": ...}`, or the number declared as `located={"NAME": ...}`

Keyword-only names are parameters. Their annotation carries type, range and search interval, their default is the
default of the recipe, and without one they are required. A trailing underscore is dropped (`lambda_` is `lambda`).
Numbers arrive as float64 tensors (0-d, or one entry per model), so that schedules do not recompile; combined with a
block, a 0-d one (`weight[i]`) does not widen it. Flags, counts and choices arrive as plain Python values.
"""

from .declare import merge_method
from .location import Location
from .method import Ignored, Law, MergeMethod, Scope
from .parameter import (
    Count,
    Embeddings,
    Fraction,
    NonNegative,
    Number,
    Others,
    Parameter,
    PerModel,
    Positive,
    Scale,
    Weight,
    default,
)
from .registry import get_method, method_names, methods
from .sidecar import Encoded, Kept, Lossless, Part, Sidecar
from .statistic import AtOnce, Round, Statistic, When, applies, statistic, takes, taking

__all__ = [
    "AtOnce",
    "Count",
    "Embeddings",
    "Encoded",
    "Fraction",
    "Ignored",
    "Kept",
    "Law",
    "Location",
    "Lossless",
    "MergeMethod",
    "NonNegative",
    "Number",
    "Others",
    "Parameter",
    "Part",
    "PerModel",
    "Positive",
    "Round",
    "Scale",
    "Scope",
    "Sidecar",
    "Statistic",
    "Weight",
    "When",
    "applies",
    "default",
    "get_method",
    "merge_method",
    "method_names",
    "methods",
    "statistic",
    "takes",
    "taking",
]
