"""Everything that an author of a merge method needs.

A merge method is a plain function over tensors, alone in a file of the same name; recipes use that name, too:

    @merge_method(family="task vectors", cite="ilharco2023task")
    def task_arithmetic(base: Tensor, models: list[Tensor], *, weight: PerModel[Weight] = default(1.0)) -> Tensor: ...

The signature is the contract. The engine passes positional arguments by name:

    base      the base tensor; annotate `Tensor | None` where a base is optional
    models    the other tensors, in the order of the recipe
    rng       a `Random`: counter-based draws, which do not depend on how the work is divided
    rounding  for each model, what rounding of its stored weights has left in its task vector: the largest singular value
              at most, and the expected norm; shape [T, 2], float64; for methods of scope "matrix" (`ops.linalg.rounding`)
    NAME      the statistic declared as `statistics={"NAME": ...}`, or the number declared as `located={"NAME": ...}`

Keyword-only arguments are parameters of recipes. The annotation gives type, range and search interval; the default is
the default in recipes, and a parameter without one is required. A trailing underscore is dropped (`lambda_` is
`lambda`). Numbers are passed as float64 tensors (0-d, or one entry per model), so that a value that changes from layer
to layer does not recompile the function; a 0-d tensor (`weight[i]`) does not promote the dtype of a block. Flags,
counts and choices are passed as plain Python values.
"""

from .declare import merge_method
from .learning import Learning
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
from .statistic import DataInputs, FromData, NumbersFromData, Statistic, When, applies, statistic, takes

__all__ = [
    "Count",
    "DataInputs",
    "Embeddings",
    "Encoded",
    "Fraction",
    "FromData",
    "Ignored",
    "Kept",
    "Law",
    "Learning",
    "Location",
    "Lossless",
    "MergeMethod",
    "NonNegative",
    "Number",
    "NumbersFromData",
    "Others",
    "Parameter",
    "Part",
    "PerModel",
    "Positive",
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
]
