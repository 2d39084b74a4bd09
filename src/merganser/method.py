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

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from .docstring import Docstring, parse_docstring
from .errors import ParameterError, did_you_mean
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
    read_parameter,
)

if TYPE_CHECKING:
    from .sidecar import Sidecar

__all__ = [
    "AtOnce",
    "Count",
    "Embeddings",
    "Fraction",
    "Law",
    "Location",
    "MergeMethod",
    "NonNegative",
    "Number",
    "Others",
    "Parameter",
    "PerModel",
    "Positive",
    "Round",
    "Scale",
    "Scope",
    "Statistic",
    "Weight",
    "When",
    "applies",
    "default",
    "merge_method",
    "statistic",
    "takes",
    "taking",
]

T = TypeVar("T")
When = str | Callable[..., bool] | None


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the inputs: an additive measurement, and what follows from it.

    Args:
        measure: Gets a block of the inputs (and whatever else it names), returns a float64 or int64 tensor of fixed
            shape. The results of all blocks are added, in the order of the blocks.
        solve: Gets the sum (or the largest) as its first argument and whatever else it names, on the CPU in float64.
        tally: Where given, what `measure` returns is only the material (of the block's size). This gets it, and the
            total of the blocks before (None for the first), and earlier statistics that it names; it returns the total
            with the block's share, which it may add in place, on the CPU. It always runs eagerly, for what
            `torch.compile` does badly, such as counting.
        largest: The results of blocks are not added; the largest of each entry counts.
    """

    measure: Callable[..., Tensor]
    solve: Callable[..., Tensor]
    tally: Callable[..., Tensor] | None = None
    largest: bool = False


@dataclass(frozen=True, slots=True)
class AtOnce:
    """A statistic of tensors of one size, k of them, without rounds.

    Args:
        measure: Gets, by name, a tensor of the inputs and whatever else a measure may name; returns a tensor.
        solve: Gets what was measured, with a leading dimension of k, then by name what a solve may name, but earlier
            statistics, which come last and have that dimension, too. Returns the statistic of each, shape [k, ...].
    """

    measure: Callable[[Mapping[str, Any]], Tensor]
    solve: Callable[[Tensor, Mapping[str, Any], Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number (or a few) about every row, a whole tensor, or the whole model, that the combination needs.

    Args:
        rounds: Passes over the inputs; `previous` names the solved result of the round before.
        over: "tensor", "model", or the name of the parameter that says which; or "row": what is measured, in one
            round, and what is solved are of the shape [rows, ...], and whoever names it later is handed the entries of
            the block's rows.
        when: Says from the parameters that it names (per-model ones are tuples) whether this tensor needs the
            statistic; the name of a flag does, too. Where it is not needed its passes are saved and it is None.
        at_once: Where given, finds the same from tensors of one block without any rounds. It always runs eagerly, and
            must agree with the rounds to the last bit.
    """

    rounds: tuple[Round, ...]
    over: str = "tensor"
    when: When = None
    at_once: AtOnce | None = None

    def wanted(self, parameters: Mapping[str, Any]) -> bool:
        """Say whether a tensor needs the statistic.

        Args:
            parameters: All parameters of the tensor, by their names in recipes.
        """
        return applies(self.when, parameters)


def statistic(
    measure: Callable[..., Tensor],
    solve: Callable[..., Tensor],
    *,
    over: str = "tensor",
    when: When = None,
    largest: bool = False,
) -> Statistic:
    """Declare a statistic of one pass."""
    return Statistic((Round(measure, solve, largest=largest),), over=over, when=when)


def applies(when: When, parameters: Mapping[str, Any]) -> bool:
    """Say whether a condition holds for these parameters, given by their names in recipes; None always does."""
    if when is None or isinstance(when, str):
        return when is None or bool(parameters[when])
    return when(**{name: parameters[name.rstrip("_")] for name in takes(when)})


@lru_cache(maxsize=1024)
def takes(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names that a measure, solve or combine function wants handed in."""
    return getattr(function, "_takes", None) or tuple(inspect.signature(function).parameters)


def taking(*names: str) -> Callable[[T], T]:
    """Declare the names that a function made by another wants handed in, where its own signature is `**given`."""

    def decorate(function: T) -> T:
        function._takes = names  # type: ignore[attr-defined]
        return function

    return decorate


@dataclass(frozen=True, slots=True)
class Location:
    """Where in the output a tensor is, and what it does there.

    Args:
        position: In a layer, or the side of the layers on which the tensor is used: embeddings and towers beside the
            language model come before them, the final norm and the head after.
        layer: Number of its layer, from 0; None outside layers.
        n_layers: Number of layers in its stack; 0 outside layers.
        role: "embedding", "head", "norm", "attention", "mlp", "expert", "router", ..., or "other".
    """

    position: Literal["before", "layer", "after"] = "before"
    layer: int | None = None
    n_layers: int = 0
    role: str = "other"


Law = Literal["identical", "zero_delta", "order", "differs"]


Scope = Literal["element", "row", "tensor", "matrix"]


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
    fuse: bool
    breaks: Mapping[Law, str]
    compat: Mapping[str, Any]
    when: Mapping[str, When]
    no_effect: Mapping[str, str]
    validate: Callable[[Mapping[str, Any]], str | None] | None
    sidecar: Sidecar | None
    doc: Docstring = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function itself."""
        return self.combine(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Travel by name: other processes look it up in their own registry."""
        from .registry import get_method

        return get_method, (self.name,)

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
        exact = all(found.at_once and parameters.get(found.over, found.over) == "tensor" for found in wanted)
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


def merge_method(
    *,
    family: str,
    cite: str,
    scope: Scope = "element",
    models: tuple[int, int | None] = (1, None),
    statistics: Mapping[str, Statistic] | None = None,
    located: Mapping[str, Callable[..., float]] | None = None,
    version: int = 1,
    fuse: bool = True,
    breaks: Mapping[Law, str] | None = None,
    compat: Mapping[str, Any] | None = None,
    when: Mapping[str, When] | None = None,
    no_effect: Mapping[str, str] | None = None,
    validate: Callable[[Mapping[str, Any]], str | None] | None = None,
    sidecar: Sidecar | None = None,
) -> Callable[[Callable[..., Tensor]], MergeMethod]:
    """Make a merge method of a function.

    Args:
        family: Group in the index of methods.
        cite: Key in `references.bib`, or "-" where no publication exists.
        scope: What one call must see: single elements (flat blocks of any length), whole rows (blocks of shape
            [rows, columns], a row being all weights of one output unit), the whole tensor in its own shape, or one
            whole weight matrix (see below).
        models: Least and largest number of models beside the base (None: no limit).
        statistics: Measured beforehand, by the name under which the function takes them, in this order; each may use
            those before it.
        located: Numbers that follow from where in the model a tensor is, by the name under which the function takes
            them. Each is computed, when the merge is planned, from `location: Location` and the parameters that it names
            (per-model ones are tuples). It may raise ParameterError.
        version: Raise it when results change; it is written to every run record.
        fuse: False keeps the method out of `torch.compile`.
        breaks: Laws of the contract suite that do not hold, each with the reason.
        compat: Parameter values that reproduce mergekit where it differs from the definition.
        when: Says of a parameter whether it can change the result, from other parameters, as in `Statistic`; one that is
            not named always can.
        no_effect: Parameters that mergekit accepts here without using them, each with a word of explanation.
        validate: Looks at all parameters of a tensor together, by their names in recipes (per-model ones as tuples);
            returns a complaint or None.
        sidecar: What is stored for each model beside the result; what its `encode` declares are parameters, too.

    A method of scope "matrix" gets the matrices of the model one by one, shape [rows, columns]: 2-D tensors that
    multiply what comes in, and the experts of a packed tensor [experts, rows, columns]. What becomes of all other
    tensors, its parameters `others: Others` and `embeddings: Embeddings` say, which it declares and does not read. It
    takes a base. Its statistics are over the model (what it needs of a matrix it has at hand), and count the matrices
    alone. It is never fused.

    Raises:
        TypeError: The declaration contradicts itself, or the docstring does not describe a parameter.
    """

    def decorate(function: Callable[..., Tensor]) -> MergeMethod:
        doc = parse_docstring(function.__doc__ or "")
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function).parameters
        parameters = _parameters([function] if sidecar is None else [function, sidecar.encode], doc)
        base = "unused"
        if "base" in signature:
            base = "optional" if type(None) in typing.get_args(hints["base"]) else "required"
        complaint = _matrix_complaint(scope, hints, base, statistics or {}) or _row_complaint(scope, statistics or {})
        if sidecar is not None:
            complaint = complaint or sidecar.complaint(parameters, scope, base)
        if complaint:
            raise TypeError(f"{function.__name__}: {complaint}")
        return MergeMethod(
            name=function.__name__,
            combine=function,
            statistics=dict(statistics or {}),
            located=dict(located or {}),
            parameters=parameters,
            family=family,
            cite=cite,
            scope=scope,
            base=typing.cast(Any, base),
            min_models=models[0],
            max_models=models[1],
            version=version,
            fuse=fuse and scope != "matrix",
            breaks=dict(breaks or {}),
            compat=dict(compat or {}),
            when=dict(when or {}),
            no_effect=dict(no_effect or {}),
            validate=validate,
            sidecar=sidecar,
            doc=doc,
        )

    return decorate


def _parameters(functions: Sequence[Callable[..., Any]], doc: Docstring) -> dict[str, Parameter]:
    """Read the parameters that functions declare, by name; of two of one name the first counts."""
    found: dict[str, Parameter] = {}
    for function in functions:
        hints = typing.get_type_hints(function, include_extras=True)
        for declared in inspect.signature(function).parameters.values():
            if declared.kind is inspect.Parameter.KEYWORD_ONLY:
                parameter = read_parameter(declared, hints[declared.name], doc)
                found.setdefault(parameter.name, parameter)
    return found


def _matrix_complaint(
    scope: Scope, hints: Mapping[str, Any], base: str, statistics: Mapping[str, Statistic]
) -> str | None:
    """Say what a method of scope "matrix" lacks, or what another one has that only such a method may have."""
    common = {"others": Others, "embeddings": Embeddings}
    declared = {name for name, hint in common.items() if hints.get(name) == hint}
    if scope != "matrix":
        odd = ", ".join(sorted(declared))
        return f"the parameters {odd} say something only where the scope is 'matrix'" if declared else None
    if declared != common.keys():
        return "scope 'matrix' needs the parameters `others: Others` and `embeddings: Embeddings`"
    if base != "required":
        return "scope 'matrix' needs `base: Tensor`, since tensors that are not matrices are merged as task vectors"
    other = next((name for name, statistic in statistics.items() if statistic.over != "model"), None)
    return f"a method of scope 'matrix' has whole matrices at hand; let it compute {other} itself" if other else None


def _row_complaint(scope: Scope, statistics: Mapping[str, Statistic]) -> str | None:
    """Say which statistic cannot be over rows."""
    for name, statistic in statistics.items():
        plain = all(round_.tally is None and not round_.largest for round_ in statistic.rounds)
        if statistic.over == "row" and (scope != "row" or len(statistic.rounds) != 1 or not plain):
            return f"{name} is over rows: this needs the scope 'row', and one round that is neither tallied nor the largest"
    return None
