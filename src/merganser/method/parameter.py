"""Parameters of merge methods: the types that authors write in signatures, and the check of values."""

from __future__ import annotations

import inspect
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import ParameterError, did_you_mean
from .docstring import Docstring

T = TypeVar("T")

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Number:
    """Range of a numeric parameter.

    Args:
        low: Smallest allowed value.
        high: Largest allowed value.
        open: Whether `low` and `high` themselves are excluded.
        search: Interval that a parameter search explores by default.
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


@dataclass(frozen=True, slots=True)
class Meaning:
    """Help text of a parameter that does the same in every method that takes it."""

    text: str


PER_MODEL = "one value per model"

Weight = Annotated[Tensor, Number(search=(0.0, 1.0))]
Scale = Annotated[Tensor, Number(search=(0.0, 2.0))]
Fraction = Annotated[Tensor, Number(0.0, 1.0, search=(0.05, 1.0))]
NonNegative = Annotated[Tensor, Number(0.0)]
Positive = Annotated[Tensor, Number(0.0, open=True)]
Count = Annotated[int, Number(1)]
PerModel = Annotated[T, PER_MODEL]

Others = Annotated[
    Literal["average", "sum", "base"],
    Meaning(
        "How tensors that are not matrices (norms, biases, convolutions) are merged: the base and the average of the "
        "task vectors, or their sum, with weight and lambda where the method has them; or the base alone."
    ),
]
"""What a method of scope "matrix" does with tensors that are not matrices."""

Embeddings = Annotated[
    Literal["others", "matrix"],
    Meaning("Whether embeddings and head are merged like the tensors that are not matrices, or as matrices."),
]
"""Whether a method of scope "matrix" treats embeddings and the head as matrices."""


def default(value: float) -> Any:
    """Return `value`, typed so that it may be the default of a tensor; of each model, for a `PerModel` parameter."""
    return value


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a merge method, under its name in recipes."""

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
        """Allowed values, in words."""
        if self.kind == "flag":
            return "true or false"
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        return str(self.range).replace("a number", "a whole number") if self.kind == "integer" else str(self.range)

    def check(self, value: object, where: str) -> Any:
        """Return `value` converted to the parameter's type.

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
        signed = self.kind == "number" and (self.range is None or math.isinf(self.range.low))
        if signed and abs(value) > _LARGEST:
            # such a number is a factor of tensors, which are float32, where it would be infinity
            raise ParameterError(f"{where}: {self.name} must be at most {_LARGEST:.1e} in size, got {value!r}")
        if self.range is not None and value not in self.range:
            raise wrong
        return int(value) if self.kind == "integer" else float(value)


def read_parameter(declared: inspect.Parameter, hint: Any, doc: Docstring) -> Parameter:
    """Return the parameter that an annotation declares.

    Args:
        declared: The keyword-only argument.
        hint: Its resolved annotation.
        doc: Docstring with the help of the parameter.

    Raises:
        TypeError: The annotation is none of the types above, or the docstring does not describe the parameter.
    """
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
    meaning = next((note.text for note in notes if isinstance(note, Meaning)), None)
    if declared.name not in doc.args and meaning is None:
        raise TypeError(f"parameter {name!r} is missing from the docstring's Args")
    return Parameter(
        name=name,
        kind=kind,
        per_model=PER_MODEL in notes,
        required=required,
        default=None if required else declared.default,
        range=next((note for note in notes if isinstance(note, Number)), None),
        choices=choices,
        help=doc.args.get(declared.name) or str(meaning),
    )
