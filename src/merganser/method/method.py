"""A registered merge method, and how parameters are checked and completed for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..errors import ParameterError, did_you_mean
from .docstring import Docstring
from .location import Location
from .parameter import (
    Parameter,
)
from .statistic import Statistic, When, applies, takes

if TYPE_CHECKING:
    from .sidecar import Sidecar

__all__ = ["Ignored", "Law", "MergeMethod", "Scope", "fill"]

Law = Literal["identical", "zero_delta", "order", "differs"]


Scope = Literal["element", "row", "tensor", "matrix"]


@dataclass(frozen=True, slots=True)
class Ignored:
    """A parameter that mergekit accepts for a method without using it.

    Args:
        reason: Why it has no effect, for the message.
    """

    reason: str


# as a key: one object per method
@dataclass(frozen=True, eq=False)
class MergeMethod:
    """A registered merge method: the function, and what its signature says about it."""

    name: str
    combine: Callable[..., Tensor]
    statistics: Mapping[str, Statistic]
    located: Mapping[str, Callable[..., float]]
    parameters: Mapping[str, Parameter]
    family: str
    cite: str
    scope: Scope
    base: Literal["required", "optional", "unused"]
    min_models: int
    max_models: int | None
    version: int
    breaks: Mapping[Law, str]
    mergekit: Mapping[str, Any]
    ignored: Mapping[str, str]
    when: Mapping[str, When]
    validate: Callable[[Mapping[str, Any]], str | None] | None
    sidecar: Sidecar | None
    doc: Docstring = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function itself."""
        return self.combine(*args, **kwargs)

    @property
    def fuse(self) -> bool:
        """Whether `torch.compile` may fuse it; what works on a whole tensor or matrix gains nothing from that."""
        return self.scope in ("element", "row")

    @cached_property
    def random(self) -> bool:
        """Whether the result depends on the seed."""
        return "rng" in inspect.signature(self.combine).parameters

    def together(self, parameters: Mapping[str, Any]) -> Literal["joined", "stacked"] | None:
        """Say how small tensors may be merged at once, eagerly, to the same bytes as one by one.

        Joined end to end where an element is told nothing but its values; stacked, those of one size, where what is
        measured of a tensor does not depend on the order of a sum.

        Args:
            parameters: All parameters of the tensors, by their names in recipes.
        """
        wanted = [found for found in self.statistics.values() if found.wanted(parameters)]
        if self.scope != "element":
            return None
        if not wanted and not self.random:
            return "joined"
        exact = all(found.at_once and found.where(parameters) == "tensor" for found in wanted)
        return "stacked" if exact and self.fuse else None

    def locate(self, parameters: Mapping[str, Any], location: Location) -> dict[str, float]:
        """Return the numbers that follow from where a tensor is, by name.

        Args:
            parameters: All parameters of the tensor, by their names in recipes.
            location: Where it is.

        Raises:
            ParameterError: The parameters do not suit a model of so many layers.
        """
        given = {"location": location, **parameters}
        return {
            name: function(**{key: given[key.rstrip("_")] for key in takes(function)})
            for name, function in self.located.items()
        }

    def matters(self, name: str, parameters: Mapping[str, Any]) -> bool:
        """Say whether a parameter can change the result.

        Args:
            name: Its name in recipes.
            parameters: All parameters of a tensor, by their names in recipes.
        """
        return applies(self.when.get(name), parameters)

    def models_text(self) -> str:
        """Say how many models the method takes, beside the base."""
        beside = {"required": " and a base", "optional": " and optionally a base", "unused": ""}[self.base]
        if self.max_models is None:
            return f"{self.min_models} or more models{beside}"
        if self.max_models == self.min_models:
            return f"exactly {self.min_models} model{'s' * (self.min_models > 1)}{beside}"
        return f"{self.min_models} to {self.max_models} models{beside}"

    def parameter(self, name: str, where: str) -> Parameter:
        """Look up a parameter by the name that recipes use.

        Raises:
            ParameterError: The method has no such parameter.
        """
        if name in self.parameters:
            return self.parameters[name]
        takes = ", ".join(sorted(self.parameters)) or "no parameters"
        hint = did_you_mean(name, self.parameters)
        raise ParameterError(f"{where}: unknown parameter {name!r} of {self.name}.{hint} {self.name} takes {takes}")


def fill(method: MergeMethod, parameters: Mapping[str, Any], n_models: int) -> dict[str, Any]:
    """Check parameters and complete them with defaults.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
    """
    from ..errors import ParameterError

    for given in parameters:
        method.parameter(given, method.name)
    filled: dict[str, Any] = {}
    for parameter in method.parameters.values():
        if parameter.name not in parameters and parameter.required:
            raise ParameterError(f"{method.name}: {parameter.name} is required: {parameter.help}")
        value = parameters.get(parameter.name, parameter.default)
        if not parameter.per_model:
            filled[parameter.name] = parameter.check(value, method.name)
            continue
        each = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * n_models
        if len(each) != n_models:
            raise ParameterError(
                f"{method.name}: {parameter.name} needs {n_models} values, one per model, got {len(each)}"
            )
        filled[parameter.name] = tuple(parameter.check(v, method.name) for v in each)
    complaint = method.validate(filled) if method.validate else None
    if complaint:
        raise ParameterError(f"{method.name}: {complaint}")
    return filled
