"""The whole framework for authors of merge methods.

A merge method is a plain function over tensors, in one file whose name is the function's name and the recipe's value:

    @merge_method(family="task vectors", cite="ilharco2023task")
    def task_arithmetic(base: Tensor, models: list[Tensor], *, weight: PerModel[Weight] = default(1.0)) -> Tensor: ...

The signature is the contract. Positional names say what is handed in:

    base      the base tensor; annotate `Tensor | None` where a base is optional
    models    the other tensors, in the order of the recipe
    rng       a `Random`: counter-based draws, the same on any machine layout
    NAME      the statistic declared as `statistics={"NAME": ...}`

Keyword-only names are parameters. Their annotation carries type, range and search interval, their default is the
default of the recipe, and without one they are required. A trailing underscore is dropped (`lambda_` is `lambda`).
Numbers arrive as float64 tensors (0-d, or one entry per model), so that schedules do not recompile; combined with a
block, a 0-d one (`weight[i]`) does not widen it. Flags, counts and choices arrive as plain Python values.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from torch import Tensor

from .docstring import Docstring, parse_docstring
from .errors import ParameterError, did_you_mean

T = TypeVar("T")
When = str | Callable[..., bool] | None


@dataclass(frozen=True, slots=True)
class Number:
    """Range of a numeric parameter.

    Args:
        low: Smallest allowed value.
        high: Largest allowed value.
        open: Whether the ends themselves are not allowed.
        search: Interval that a search explores by default.
    """

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    search: tuple[float, float] | None = None

    def __contains__(self, value: float) -> bool:
        if self.open:
            return self.low < value < self.high
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "any finite number"
        if math.isinf(self.high):
            return f"a number {'above' if self.open else 'of at least'} {self.low:g}"
        return f"a number between {self.low:g} and {self.high:g}{', both excluded' if self.open else ''}"


PER_MODEL = "one value per model"

Weight = Annotated[Tensor, Number(search=(0.0, 1.0))]
Scale = Annotated[Tensor, Number(search=(0.0, 2.0))]
Fraction = Annotated[Tensor, Number(0.0, 1.0, search=(0.05, 1.0))]
NonNegative = Annotated[Tensor, Number(0.0)]
Positive = Annotated[Tensor, Number(0.0, open=True)]
Count = Annotated[int, Number(1)]
PerModel = Annotated[T, PER_MODEL]


def default(value: float) -> Any:
    """Give a numeric parameter its default; for a `PerModel` parameter, the default of each model."""
    return value


@dataclass(frozen=True, slots=True)
class Parameter:
    """A setting of a merge method, as the recipe writes it."""

    name: str
    kind: Literal["number", "integer", "flag", "choice"]
    per_model: bool
    required: bool
    default: Any
    range: Number | None
    choices: tuple[str, ...]
    help: str

    @property
    def argument(self) -> str:
        """Name of the keyword argument (`lambda_` for `lambda`)."""
        return f"{self.name}_" if self.name == "lambda" else self.name

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        if self.kind == "flag":
            return "true or false"
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        return str(self.range).replace("a number", "a whole number") if self.kind == "integer" else str(self.range)

    def check(self, value: object, where: str) -> Any:
        """Return `value` in the parameter's type.

        Args:
            value: One scalar from the recipe.
            where: Start of the message: the place in the recipe.

        Raises:
            ParameterError: `value` has the wrong type or is out of range.
        """
        wrong = ParameterError(f"{where}: {self.name} must be {self.allowed}, got {value!r}")
        if self.kind == "flag":
            # mergekit recipes write flags as numbers, too
            if value not in (True, False) or isinstance(value, str):
                raise wrong
            return bool(value)
        if self.kind == "choice":
            if value not in self.choices:
                raise ParameterError(f"{wrong}.{did_you_mean(str(value), self.choices)}")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise wrong
        if self.kind == "integer" and value != int(value):
            raise wrong
        if self.range is not None and value not in self.range:
            raise wrong
        return int(value) if self.kind == "integer" else float(value)


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the inputs: an additive measurement, and what follows from it.

    Args:
        measure: Gets a block of the inputs (and whatever else it names), returns a float64 or int64 tensor of fixed
            shape. The results of all blocks are added, in the order of the blocks.
        solve: Gets the sum as its first argument and whatever else it names, on the CPU in float64.
        tally: Where given, what `measure` returns is only the material (of the block's size), and this makes the
            additive tensor of it. It always runs eagerly, for what `torch.compile` does badly, such as counting.
    """

    measure: Callable[..., Tensor]
    solve: Callable[..., Tensor]
    tally: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Statistic:
    """A number (or a few) about a whole tensor, or the whole model, that the combination needs.

    Args:
        rounds: Passes over the inputs; `previous` names the solved result of the round before.
        over: "tensor", "model", or the name of the parameter that says which.
        when: Says from the parameters that it names (per-model ones are tuples) whether this tensor needs the
            statistic; the name of a flag does, too. Where it is not needed its passes are saved and it is None.
    """

    rounds: tuple[Round, ...]
    over: str = "tensor"
    when: When = None

    def wanted(self, parameters: Mapping[str, Any]) -> bool:
        """Say whether a tensor needs the statistic.

        Args:
            parameters: All parameters of the tensor, by their names in recipes.
        """
        if self.when is None or isinstance(self.when, str):
            return self.when is None or bool(parameters[self.when])
        return self.when(**{name: parameters[name.rstrip("_")] for name in takes(self.when)})


def statistic(
    measure: Callable[..., Tensor], solve: Callable[..., Tensor], *, over: str = "tensor", when: When = None
) -> Statistic:
    """Declare a statistic of one pass."""
    return Statistic((Round(measure, solve),), over=over, when=when)


def takes(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names that a measure, solve or combine function wants handed in."""
    return getattr(function, "_takes", None) or tuple(inspect.signature(function).parameters)


def taking(*names: str) -> Callable[[T], T]:
    """Declare the names that a function made by another wants handed in, where its own signature is `**given`."""

    def decorate(function: T) -> T:
        function._takes = names  # type: ignore[attr-defined]
        return function

    return decorate


Law = Literal["identical", "zero_delta", "order", "differs"]


@dataclass(frozen=True)
class MergeMethod:
    """A registered merge method: the function, and what its signature says about it."""

    name: str
    combine: Callable[..., Tensor]
    statistics: Mapping[str, Statistic]
    parameters: Mapping[str, Parameter]
    family: str
    cite: str
    scope: Literal["element", "row", "tensor"]
    base: Literal["required", "optional", "unused"]
    min_models: int
    max_models: int | None
    version: int
    fuse: bool
    breaks: Mapping[Law, str]
    compat: Mapping[str, Any]
    no_effect: Mapping[str, str]
    validate: Callable[[Mapping[str, Any]], str | None] | None
    doc: Docstring = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function itself."""
        return self.combine(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Travel by name: other processes look it up in their own registry."""
        from .registry import get_method

        return get_method, (self.name,)

    @property
    def random(self) -> bool:
        """Whether the result depends on the seed."""
        return "rng" in inspect.signature(self.combine).parameters

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
    scope: Literal["element", "row", "tensor"] = "element",
    models: tuple[int, int | None] = (1, None),
    statistics: Mapping[str, Statistic] | None = None,
    version: int = 1,
    fuse: bool = True,
    breaks: Mapping[Law, str] | None = None,
    compat: Mapping[str, Any] | None = None,
    no_effect: Mapping[str, str] | None = None,
    validate: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> Callable[[Callable[..., Tensor]], MergeMethod]:
    """Make a merge method of a function.

    Args:
        family: Group in the index of methods.
        cite: Key in `references.bib`, or "-" where no publication exists.
        scope: What one call must see: single elements (flat blocks of any length), whole rows (blocks of shape
            [rows, columns], a row being all weights of one output unit), or the whole tensor in its own shape.
        models: Least and largest number of models beside the base (None: no limit).
        statistics: Measured beforehand, by the name under which the function takes them, in this order; each may use
            those before it.
        version: Raise it when results change; it is written to every run record.
        fuse: False keeps the method out of `torch.compile`.
        breaks: Laws of the contract suite that do not hold, each with the reason.
        compat: Parameter values that reproduce mergekit where it differs from the definition.
        no_effect: Parameters that mergekit accepts here without using them, each with a word of explanation.
        validate: Looks at all parameters of a tensor together, by their names in recipes (per-model ones as tuples);
            returns a complaint or None.
    """

    def decorate(function: Callable[..., Tensor]) -> MergeMethod:
        doc = parse_docstring(function.__doc__ or "")
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function).parameters
        parameters = [
            _parameter(p, hints[p.name], doc) for p in signature.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        base = "unused"
        if "base" in signature:
            base = "optional" if type(None) in typing.get_args(hints["base"]) else "required"
        return MergeMethod(
            name=function.__name__,
            combine=function,
            statistics=dict(statistics or {}),
            parameters={p.name: p for p in parameters},
            family=family,
            cite=cite,
            scope=scope,
            base=typing.cast(Any, base),
            min_models=models[0],
            max_models=models[1],
            version=version,
            fuse=fuse,
            breaks=dict(breaks or {}),
            compat=dict(compat or {}),
            no_effect=dict(no_effect or {}),
            validate=validate,
            doc=doc,
        )

    return decorate


def _parameter(declared: inspect.Parameter, hint: Any, doc: Docstring) -> Parameter:
    """Read a parameter from its annotation."""
    name = declared.name.rstrip("_")
    required = declared.default is inspect.Parameter.empty
    notes: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *rest = typing.get_args(hint)
        notes = tuple(rest)
    kinds: dict[Any, Literal["number", "integer", "flag"]] = {bool: "flag", int: "integer", Tensor: "number"}
    choices: tuple[str, ...] = ()
    kind: Literal["number", "integer", "flag", "choice"]
    if typing.get_origin(hint) is Literal:
        kind, choices = "choice", typing.get_args(hint)
    elif hint in kinds:
        kind = kinds[hint]
    else:
        raise TypeError(f"parameter {name!r}: annotate it with Weight, Fraction, ..., Count, bool or Literal[...]")
    if declared.name not in doc.args:
        raise TypeError(f"parameter {name!r} is missing from the docstring's Args")
    return Parameter(
        name=name,
        kind=kind,
        per_model=PER_MODEL in notes,
        required=required,
        default=None if required else declared.default,
        range=next((note for note in notes if isinstance(note, Number)), None),
        choices=choices,
        help=doc.args[declared.name],
    )
