"""What a merge method stores beside the shared model, and how a task's own tensors come back from it.

A sidecar method is a merge method whose result, the shared model, is only half of the output. The other half is
declared with it:

    @merge_method(family="sidecars", cite="...", sidecar=Sidecar(parts, encode, decode))

The three functions take by name what they need, as measures do:

    base, merged      blocks of the base and of the shared model as it was written, in the compute dtype
    models            the models, for `encode`; each is read when it is asked for, so ask once
    shape, n_models   for `parts`
    NAME              a parameter, a statistic, and for `decode` a part: that of the task that is restored

Keyword-only names of `encode` are parameters of the recipe, like those of the method itself.
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
"""Parts by name: a tensor for a shared part, one tensor per model for the others."""

Kept = Annotated[
    Literal["own", "merged"],
    Meaning(
        "What stands for tensors that are not compressed (norms, biases): the task's own, stored as they are, or those "
        "of the shared model, for which nothing is stored."
    ),
]
"""What a sidecar of matrices does with all that is no matrix."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that is stored for a tensor of the model.

    Args:
        shape: Its shape.
        dtype: Its dtype, by torch's name; None for that of the tensor in the task's model (in the shared model, for a
            shared part), to which the engine rounds it.
        shared: Whether it is stored once for all tasks, and not for each.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Lossless:
    """Settings with which restoring gives the models back, to rounding.

    Args:
        parameters: Their values, by their names in recipes.
        models: With how many models; None for any number.
        tolerance: Norm of the loss over that of the model that is rounding, on numbers of float32.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    models: int | None = None
    tolerance: float = 3e-6


@dataclass(frozen=True)
class Sidecar:
    """What is stored for the tasks, and how it is made and read.

    Args:
        parts: Returns the parts of a block of that shape, by name. It sees headers only, so that sizes and places are
            known before anything is read. The parts of a tensor are those of its blocks, one behind the other.
        encode: Returns the parts of a block, from the models and the shared model.
        decode: Returns a task's block from its parts.
        scope: What one call sees: single elements (flat blocks of a multiple of 8 elements), whole rows (blocks of
            shape [rows, columns], of a multiple of 8 rows), or one whole matrix (each of the experts of a packed
            tensor [experts, rows, columns] by itself).
        statistics: Measured beforehand as those of methods are, with `merged` at hand, too; one number per model, shape
            [T]. They are stored for each task under their names, float64, and handed to `decode`.
        base: Says from the parameters that it names whether restoring takes the base; by default it does where `decode`
            names it.
        matrices: Whether only matrices are treated, as methods of scope "matrix" tell them from the rest. `encode` then
            declares `others: Kept` and `embeddings: Embeddings` and does not read them.
        lossless: Settings that give the models back; None where none does.
    """

    parts: Callable[..., Mapping[str, Part]]
    encode: Callable[..., Encoded]
    decode: Callable[..., Tensor]
    scope: Literal["element", "row", "matrix"] = "element"
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    base: When = None
    matrices: bool = False
    lossless: Lossless | None = None

    def complaint(self, parameters: Mapping[str, object], scope: str, base: str) -> str | None:
        """Say what contradicts itself in the declaration of a method with this sidecar.

        Args:
            parameters: The method's, by name.
            scope: The method's.
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
