"""Sidecars: data that a merge method stores per task in addition to the shared model, to restore the task's model.

The result of a sidecar method is the shared model and a sidecar. The sidecar is declared with the method:

    @merge_method(family="sidecars", cite="...", sidecar=Sidecar(parts, encode, decode))

The three functions take their arguments by name, as the measures of statistics do:

    base, merged      blocks of the base and of the shared model as it was written, in the compute dtype
    models            the models, for `encode` only; indexing reads a model from disk, so index each one once
    shape, n_models   shape of the block and number of models, for `parts` only
    NAME              a parameter or a statistic; for `decode` also a part, that of the task that is restored

Keyword-only arguments of `encode` are parameters of recipes, like those of the method itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor

from .parameter import Meaning

if TYPE_CHECKING:
    from .statistic import Statistic, When

Encoded = Mapping[str, Tensor | Sequence[Tensor]]
"""Parts by name: one tensor for a shared part, one tensor per model for any other part."""

Kept = Annotated[
    Literal["own", "merged"],
    Meaning(
        "What tensors that are not compressed (norms, biases) are restored to: the task's own, stored as they are, or those "
        "of the shared model, for which nothing is stored."
    ),
]
"""What a sidecar of matrices does with tensors that are not matrices."""


Keep = Annotated[
    Literal["parts", "own", "merged"],
    Meaning(
        "What the tensors of a task are restored from: the parts of the method; a copy of the task's own tensor, stored as it "
        "is; or the shared model's tensor, for which nothing is stored."
    ),
]
"""Which tensors of tasks are stored by a sidecar's parts; with filters, each part of a model in its own way."""


def for_all_sidecars(*, keep: Keep = "parts") -> None:
    """Declare the parameters that every method with a sidecar has; the engine reads them."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that the sidecar stores for one tensor of the model.

    Args:
        shape: Its shape.
        dtype: Its dtype, as torch names it. None: the engine rounds it to the dtype of the tensor in the task's model
            (in the shared model, for a shared part).
        shared: Whether it is stored once for all tasks instead of once per task.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Lossless:
    """Settings with which the restored models equal the originals up to rounding.

    Args:
        parameters: Values of the parameters, by their names in recipes.
        models: Number of models for which this holds; None for any number.
        tolerance: Relative error that counts as rounding in float32: norm of the difference over norm of the model.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    models: int | None = None
    tolerance: float = 3e-6


@dataclass(frozen=True)
class Sidecar:
    """What is stored for the tasks, and how it is encoded and decoded.

    Args:
        parts: Returns the parts of a block of a given shape, by name. It gets shapes only, so that sizes and offsets
            are known before any weights are read. The parts of a tensor are the concatenated parts of its blocks.
        encode: Returns the parts of a block, from the models and the shared model.
        decode: Returns a task's block from its parts.
        scope: What one call sees: single elements (flat blocks of a multiple of 8 elements), whole rows (blocks of
            shape [rows, columns], of a multiple of 8 rows), or one whole matrix (one expert at a time of a packed
            tensor [experts, rows, columns]).
        statistics: Statistics that are measured before encoding, as for methods, but with `merged` available, too; one
            number per model, shape [T]. They are stored for each task by name, float64, and passed to `decode`.
        base: Condition on the parameters under which restoring needs the base; by default it does if `decode` takes it.
        matrices: Whether only matrices are encoded, selected as for methods of scope "matrix". `encode` must then
            declare `others: Kept` and `embeddings: Embeddings`, but does not read them.
        lossless: Settings that restore the models up to rounding; None if there are none.
        factors: Returns left [rows, k] and right [k, columns] from the parts of a matrix, where `decode` returns base
            or merged plus left @ right: the base if `decode` needs it under these parameters, else the merged matrix.
            None if the parts are not of low rank.
    """

    parts: Callable[..., Mapping[str, Part]]
    encode: Callable[..., Encoded]
    decode: Callable[..., Tensor]
    scope: Literal["element", "row", "matrix"] = "element"
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    base: When = None
    matrices: bool = False
    lossless: Lossless | None = None
    factors: Callable[..., tuple[Tensor, Tensor]] | None = None

    def complaint(self, parameters: Mapping[str, object], scope: str, base: str) -> str | None:
        """Return what is wrong in the declaration of a method with this sidecar; None if nothing is.

        Args:
            parameters: Parameters of the method, by name.
            scope: Scope of the method.
            base: Whether the method takes a base ("required", "optional", "unused").
        """
        if base != "required":
            return "a method with a sidecar needs `base: Tensor`: what it stores is measured from there"
        if scope == "matrix":
            return "a method of scope 'matrix' cannot have a sidecar; let the shared model be made by elements"
        if self.matrices and not {"others", "embeddings"} <= parameters.keys():
            return "a sidecar of matrices needs the parameters `others: Kept` and `embeddings: Embeddings`"
        if self.scope == "matrix" and not self.matrices:
            return "a sidecar of scope 'matrix' treats matrices alone: matrices=True"
        rounds = [round_ for statistic in self.statistics.values() for round_ in statistic.rounds]
        if any(statistic.over == "row" for statistic in self.statistics.values()) or any(r.largest for r in rounds):
            return "statistics of a sidecar are sums over tensors or the model, neither over rows nor the largest"
        return None
