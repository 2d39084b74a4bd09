"""The operations of a function as a graph, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


class Unfusable(Exception):
    """A function, or a part of it, cannot become a loop; the text says why."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A size that differs from block to block.

    Args:
        name: "size", the number of elements, or "rows".
        times: Factor of it.
    """

    name: str
    times: int = 1

    def of(self, sizes: Mapping[str, int]) -> int:
        """Return it for a block of these sizes."""
        return self.times * sizes[self.name]


SIZE = Symbol("size")
ROWS = Symbol("rows")


@dataclass(frozen=True, slots=True)
class Ref:
    """The result of an earlier node of the graph."""

    index: int


@dataclass(frozen=True, slots=True)
class Node:
    """One operation, or an input.

    Args:
        func: What computes it in torch; None for inputs.
        name: Such as "aten.add.Tensor"; in-place operations have the name of their out-of-place form.
        args: Positional arguments: `Ref`, `Symbol`, numbers, dtypes, tuples of these.
        kwargs: Named arguments.
        dtype: Dtype of the result; None if it is not a tensor.
        shape: Its shape; None if it is not a tensor.
        operands: Dtype to which its operands are converted; None for operations without such a dtype.
    """

    func: Callable[..., Any] | None
    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    dtype: torch.dtype | None = None
    shape: tuple[int | Symbol, ...] | None = None
    operands: torch.dtype | None = None

    def refs(self) -> Iterator[Ref]:
        """Yield the nodes that it takes."""
        yield from _refs(self.args)
        yield from _refs(tuple((self.kwargs or {}).values()))

    def symbols(self) -> bool:
        """Return whether its arguments hold a size that differs from block to block."""
        return _has_symbol((self.args, tuple((self.kwargs or {}).values())))


@dataclass(frozen=True, slots=True)
class Graph:
    """The recorded operations of a function.

    Args:
        nodes: Inputs first, in the order in which they are handed in.
        inputs: Number of inputs.
        outputs: What the function returns.
        columns: Length of the rows of blocks; None where blocks are flat.
        least: Fewest rows, or elements of flat blocks, for which it holds.
    """

    nodes: tuple[Node, ...]
    inputs: int
    outputs: tuple[Ref, ...]
    columns: int | None
    least: int


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _refs(part)


def _has_symbol(value: Any) -> bool:
    return isinstance(value, Symbol) or (isinstance(value, tuple) and any(map(_has_symbol, value)))
