"""The methods that make rows of new tokens: each gives rows of the model, and coefficients, for every new token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ParameterError, did_you_mean
from .neighbours import barycentric, focus, interpolate, wechsel
from .omp import matching_pursuit

__all__ = ["METHODS", "Method", "method_named"]

Solve = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to make rows of new tokens.

    Args:
        name: Its name.
        help: What it does, in a line.
        solve: Approximates vectors of the donor (float32, [n, d]) by at most k of its shared rows ([v, d]), and returns
            indices and coefficients, [n, k] each; None for methods that do not look at the donor's embedding.
        k: Number of rows that are combined by default.
    """

    name: str
    help: str
    solve: Solve | None
    k: int = 0


_ALL = (
    Method(
        "omp",
        "the best combination of few shared tokens, chosen one by one in the donor's embedding",
        matching_pursuit,
        64,
    ),
    Method(
        "interpolate", "nearest shared tokens in the donor's embedding, weighted by inverse distance", interpolate, 64
    ),
    Method("barycentric", "nearest shared tokens, with the weights of sum 1 that fit best", barycentric, 64),
    Method("focus", "shared tokens of largest cosine, weighted by sparsemax", focus, 1024),
    Method("wechsel", "shared tokens of largest cosine, weighted by softmax", wechsel, 10),
    Method("subword", "mean of the model's own pieces of the token's text", None),
    Method("mean", "mean of all rows", None),
    Method("zero", "zeros", None),
)
METHODS = {method.name: method for method in _ALL}


def method_named(name: str) -> Method:
    """Return a method by its name.

    Raises:
        ParameterError: There is none of this name.
    """
    if name not in METHODS:
        raise ParameterError(f"--method {name}: is not known.{did_you_mean(name, METHODS)} Known: {', '.join(METHODS)}")
    return METHODS[name]
