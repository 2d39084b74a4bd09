"""Statistics: what a method measures before it merges."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

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

    def where(self, parameters: Mapping[str, Any]) -> str:
        """Return over what it is measured with these parameters: "row", "tensor" or "model".

        Args:
            parameters: All parameters of the tensor, by their names in recipes.
        """
        return str(parameters.get(self.over, self.over))


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
