"""A registered merge method, and the check and completion of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from ..errors import ParameterError, did_you_mean
from .docstring import Docstring
from .location import Location
from .parameter import Parameter
from .statistic import DataInputs, FromData, NumbersFromData, Statistic, When, applies, takes

if TYPE_CHECKING:
    from .sidecar import Sidecar

__all__ = ["Ignored", "Law", "MergeMethod", "Scope", "fill"]

T = TypeVar("T")

Law = Literal["identical", "zero_delta", "order", "differs"]


Scope = Literal["element", "row", "tensor", "matrix", "factors"]


@dataclass(frozen=True, slots=True)
class Ignored:
    """A parameter that mergekit accepts for a method without using it.

    Args:
        reason: Why it has no effect, for the message.
    """

    reason: str


# eq=False: methods serve as dictionary keys, compared by identity; there is one object per method
@dataclass(frozen=True, eq=False)
class MergeMethod:
    """A registered merge method: the function, and what its signature and decorator declare."""

    name: str
    combine: Callable[..., Tensor]
    statistics: Mapping[str, Statistic]
    from_data: Mapping[str, FromData]
    numbers: Mapping[str, NumbersFromData]
    located: Mapping[str, Callable[..., float | Sequence[float]]]
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
        """Whether its operations are fused; a function over a whole tensor or matrix gains nothing from that."""
        return self.scope in ("element", "row") and not self.from_data

    @property
    def foreign(self) -> bool:
        """Whether another package declares it."""
        return self.combine.__module__.partition(".")[0] != __name__.partition(".")[0]

    @cached_property
    def data_inputs(self) -> DataInputs:
        """What computes the inputs that its statistics from data are of, as in `FromData`."""
        return next((own.inputs for own in self.from_data.values()), "own")

    @property
    def reads_alike(self) -> bool:
        """Whether all models have to read the same tokens: each of them runs on the data of all."""
        return self.data_inputs in ("mean", "zipped")

    @cached_property
    def data_of(self) -> Literal["models", "base", "first"]:
        """Whose statistics from data it takes, as in `FromData`."""
        return next((own.of for own in self.from_data.values() if own.of != "base_on_models"), "models")

    def data_sources(self, base: Sequence[T], models: Sequence[T]) -> Sequence[T]:
        """Return those of the base (none or one) and the models whose statistics from data it takes, as `data_of` says."""
        return {"models": models, "base": base, "first": models[:1]}[self.data_of]

    def data_statistics(self, *, of_base: bool = False, optional: bool = True) -> tuple[str, ...]:
        """Return the names of the statistics that `merganser calibrate` measures for it, each once.

        Args:
            of_base: Those of the base on the data of every model, in place of those of `data_sources`.
            optional: Whether to count those in without which it works.
        """
        found: list[str] = [own.statistic for own in self.from_data.values() if (own.of == "base_on_models") == of_base]
        if not of_base:
            found += [own.measured for own in self.numbers.values() if optional or not own.optional]
        return tuple(dict.fromkeys(found))

    @cached_property
    def random(self) -> bool:
        """Whether the result depends on the seed."""
        return "rng" in inspect.signature(self.combine).parameters

    def together(self, parameters: Mapping[str, Any]) -> Literal["joined", "stacked"] | None:
        """Return how several small tensors can be merged in one eager call, with the same bytes as one by one.

        Args:
            parameters: All parameters of the tensors, by their names in recipes.

        Returns:
            "joined": concatenated, because an output element depends only on its own inputs; "stacked": tensors of one
            size along a new dimension, because their statistics do not depend on the order of a sum; None: neither.
        """
        wanted = [found for found in self.statistics.values() if found.wanted(parameters)]
        if self.scope != "element" or self.from_data:
            return None
        if not wanted and not self.random:
            return "joined"
        exact = all(found.at_once and found.where(parameters) == "tensor" for found in wanted)
        return "stacked" if exact and self.fuse else None

    @cached_property
    def goes_by_location(self) -> bool:
        """Whether a number follows from the position of a tensor."""
        return any("location" in takes(function) for function in self.located.values())

    def locate(
        self, parameters: Mapping[str, Any], location: Location, numbers: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, float | Sequence[float]]:
        """Return the numbers that follow from the position of a tensor, by name.

        Args:
            parameters: All parameters of the tensor, by their names in recipes.
            location: Position of the tensor.
            numbers: Numbers from data; None in place of those that are missing.

        Raises:
            ParameterError: The parameters do not suit the model's number of layers.
        """
        if not self.located:
            return {}
        given = {"location": location, **parameters, **dict.fromkeys(self.numbers), **numbers}
        return {
            name: function(**{key: given[key.rstrip("_")] for key in takes(function)})
            for name, function in self.located.items()
        }

    def matters(self, name: str, parameters: Mapping[str, Any]) -> bool:
        """Return whether a parameter can change the result.

        Args:
            name: Its name in recipes.
            parameters: All parameters of a tensor, by their names in recipes.
        """
        return applies(self.when.get(name), parameters)

    def models_text(self) -> str:
        """Return in words how many models the method takes, and whether it takes a base."""
        beside = {"required": " and a base", "optional": " and optionally a base", "unused": ""}[self.base]
        if self.max_models is None:
            return f"{self.min_models} or more models{beside}"
        if self.max_models == self.min_models:
            return f"exactly {self.min_models} model{'s' * (self.min_models > 1)}{beside}"
        return f"{self.min_models} to {self.max_models} models{beside}"

    def parameter(self, name: str, where: str) -> Parameter:
        """Return a parameter by its name in recipes.

        Raises:
            ParameterError: The method has no such parameter.
        """
        if name in self.parameters:
            return self.parameters[name]
        takes = ", ".join(sorted(self.parameters)) or "no parameters"
        hint = did_you_mean(name, self.parameters)
        raise ParameterError(f"{where}: unknown parameter {name!r} of {self.name}.{hint} {self.name} takes {takes}")


def fill(method: MergeMethod, parameters: Mapping[str, Any], n_models: int) -> dict[str, Any]:
    """Check parameters and complete them with defaults; per-model ones become tuples of `n_models` values.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or has the wrong number of values.
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
