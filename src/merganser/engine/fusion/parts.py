"""What a graph is divided into: loops, described by the values that they store, and operations of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .graph import Graph
from .trace import Form


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A value inside a loop.

    Args:
        name: What computes it: the name of an operation; "load", "constant" or "index".
        args: Values, or Python numbers.
        dtype: Its dtype.
        place: "fixed", "scalar", "row", "column" or "element".
        operands: As in `Node`.
        source: For "load": the node whose result is read.
        stage: The first stage whose loop can compute it.
    """

    name: str
    args: tuple[Any, ...]
    dtype: torch.dtype
    place: str
    operands: torch.dtype | None = None
    source: int | None = None
    stage: int = 0


@dataclass(frozen=True, slots=True)
class Store:
    """What a loop writes.

    Args:
        value: The value.
        place: "element", "row" or "scalar": what the target has an entry for, or what is reduced.
        target: Node whose tensor receives it.
        part: Index of the part of the target, where that is a stack, or has a histogram for each part.
        reduce: "sum" or "max" of the elements; "count": how often each occurs; "count few": the same, most being negative,
            which are not counted; "place": every element is written to a column of its row that was computed for it;
            None: the elements themselves.
        over: What is reduced: "block" or "row".
    """

    value: Value
    place: str
    target: int
    part: int = 0
    reduce: str | None = None
    over: str = "block"


@dataclass(slots=True)
class Stage:
    """A loop, and what torch runs after it.

    Args:
        stores: What the loop writes; no loop where empty.
        eager: Nodes that torch runs then.
    """

    stores: list[Store] = field(default_factory=list)
    eager: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lowered:
    """A divided graph.

    Args:
        graph: The graph.
        forms: Forms of its inputs.
        prologue: Nodes that torch computes once per tensor.
        stages: What runs for each block, in order.
        between: Names of the operations on elements that torch runs, as they are no part of a loop.
    """

    graph: Graph
    forms: tuple[Form, ...]
    prologue: tuple[int, ...]
    stages: tuple[Stage, ...]
    between: tuple[str, ...]
