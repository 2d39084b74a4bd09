"""Decide which method merges a tensor: the recipe's, or a simple one for tensors that a matrix method leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

from ...errors import ParameterError
from ...method import Location, MergeMethod
from ...method.registry import get_method

T = TypeVar("T")

_TABLES = ("embedding", "head", "position")


@dataclass(frozen=True, slots=True)
class Treatment:
    """How one tensor is merged.

    Args:
        method: Merges it.
        parameters: Parameters of that method, by their names in recipes; equal ones are the same object.
        located: Numbers that the method derives from the tensor's location.
    """

    method: MergeMethod
    parameters: Mapping[str, Any]
    located: Mapping[str, float | Sequence[float]] = field(default_factory=dict)

    def inputs(self, base: T | None, models: Sequence[T]) -> tuple[T | None, Sequence[T]]:
        """Return base and models as the method takes them; without a base (passthrough), the base is the model."""
        if base is None or self.method.base != "unused":
            return base, models
        return None, [base]


def treat(
    method: MergeMethod,
    parameters: Mapping[str, Any],
    *,
    name: str,
    shape: Sequence[int],
    role: str | None,
    location: Location,
    n_models: int,
    based: bool,
    numbers: Mapping[str, Any] = MappingProxyType({}),
) -> Treatment:
    """Decide how a tensor is merged.

    Args:
        method: The recipe's method.
        parameters: Its parameters for this tensor.
        name: Name of the tensor.
        shape: Its shape.
        role: Its role, from `anatomy`; None if unknown: a tensor of two dimensions then counts as a matrix.
        location: Its location.
        n_models: Number of models besides the base.
        based: Whether there is a base.
        numbers: Numbers from data that the method takes, by name.

    Raises:
        ParameterError: The parameters do not fit a tensor at this location.
    """
    if method.scope != "matrix" or is_matrix(name, shape, role, tables=parameters["embeddings"] == "matrix"):
        return Treatment(method, parameters, method.locate(parameters, location, numbers))
    weight = parameters.get("weight", 1.0)
    each = weight if isinstance(weight, tuple) else (weight,) * n_models
    if parameters["others"] == "base" and not based:
        raise ParameterError(f"{name}: is not a matrix, and others: 'base' keeps them, and there is no base_model")
    beside = _beside(parameters["others"], each, parameters.get("lambda", 1.0), based)
    complaint = beside.method.validate(beside.parameters) if beside.method.validate else None
    if complaint:
        raise ParameterError(
            f"{name}: is averaged, as it is not a matrix (others: {parameters['others']}): {complaint}"
        )
    return beside


def is_matrix(name: str, shape: Sequence[int], role: str | None, *, tables: bool) -> bool:
    """Return whether a tensor is a weight matrix that multiplies activations, or a stack of them, one per expert.

    Args:
        name: Name of the tensor.
        shape: Its shape.
        role: Its role; None if unknown.
        tables: Whether tables of tokens and positions count as matrices.
    """
    if len(shape) != (3 if role == "expert" and len(shape) == 3 else 2):
        return False
    # biases of packed experts and norms per head have two dimensions, too
    if role == "norm" or name.endswith("bias"):
        return False
    return tables or role not in _TABLES


@lru_cache(maxsize=1)
def untouched() -> Treatment:
    """Return the treatment of a tensor that is copied from one model."""
    return Treatment(get_method("passthrough"), {"scale": (1.0,)})


@lru_cache(maxsize=1024)
def _beside(others: str, weight: tuple[float, ...], lambda_: float, based: bool) -> Treatment:
    """Return how tensors that are not matrices are merged."""
    if others == "base":
        return untouched()
    parameters: dict[str, Any] = {"weight": weight, "normalize": others == "average"}
    if not based:
        return Treatment(get_method("linear"), parameters)
    return Treatment(get_method("task_arithmetic"), {**parameters, "lambda": lambda_})
