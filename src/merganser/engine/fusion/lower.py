"""Divide a graph into what torch computes once per tensor, loops over the block, and what torch computes between them.

A value has a *place*, by its shape:

    fixed      the same for all blocks of a tensor (weights, cuts, keys): computed by torch once, in the prologue
    scalar     one number per block, such as the index of its first element
    row        one number per row of the block, shape [rows] or [rows, 1]
    element    one number per element of the block

Loops compute scalars, rows and elements by operations that `arithmetic` knows. Their *stage* says when: a loop of stage s
may read what earlier stages have stored. A reduction, such as the sum of a row, is stored at the end of its loop, so what
is computed from it belongs to the next stage. So does the result of an operation that torch runs between loops.
Values are not kept from loop to loop, but computed again from what was stored, since reading memory takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .arithmetic import ELEMENTWISE, computes
from .graph import ROWS, SIZE, Graph, Node, Ref, Symbol, Unfusable
from .parts import Lowered, Stage, Store, Value
from .trace import Form
from .vectors import FLOATS, converts

_STORED = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)

# operations whose result has the elements of their argument, in the same order
_SAME = {
    f"aten.{name}"
    for name in (
        "view.default",
        "_unsafe_view.default",
        "reshape.default",
        "expand.default",
        "unsqueeze.default",
        "squeeze.dim",
        "squeeze.default",
        "detach.default",
        "alias.default",
        "clone.default",
        "lift_fresh.default",
    )
}
_FILLED = {
    "aten.zeros_like.default": 0,
    "aten.zeros.default": 0,
    "aten.new_zeros.default": 0,
    "aten.ones_like.default": 1,
    "aten.ones.default": 1,
    "aten.new_ones.default": 1,
}
_FULL = ("aten.full_like.default", "aten.full.default", "aten.new_full.default")
_TOTALS = {"aten.sum.default": "sum", "aten.max.default": "max", "aten.amax.default": "max"}
_OF_ROWS = {"aten.sum.dim_IntList": "sum", "aten.amax.default": "max"}


def lower(graph: Graph, forms: Sequence[Form]) -> Lowered:
    """Divide a graph.

    Raises:
        Unfusable: Nothing is left for a loop.
    """
    lowering = _Lowering(graph, tuple(forms))
    for index in range(len(graph.nodes)):
        lowering.place(index)
    for output in graph.outputs:
        lowering.need(output.index)
    stages = lowering.stages
    if not any(stage.stores for stage in stages.values()):
        raise Unfusable("no operation that a loop knows works on elements")
    ordered = [stages.get(number, Stage()) for number in range(max(stages) + 1)]
    for stage in ordered:
        stage.eager.sort()
    return Lowered(graph, lowering.forms, tuple(sorted(lowering.prologue)), tuple(ordered), tuple(lowering.between))


class _Lowering:
    """The work on one graph: `place` every node, in order, then say what is needed."""

    def __init__(self, graph: Graph, forms: tuple[Form, ...]) -> None:
        self._graph = graph
        self.forms = forms
        # values that loops can compute; other nodes are tensors: fixed, or computed between loops at a stage
        self._values: dict[int, Value] = {}
        self._stacks: dict[int, tuple[Value, ...]] = {}
        self._tensors: dict[int, int | None] = {}
        self._same: dict[Any, Value] = {}
        self._reductions: dict[int, tuple[Store, ...]] = {}
        self._done: set[int] = set()
        self.prologue: set[int] = set()
        self.stages: dict[int, Stage] = {}
        self.between: dict[str, None] = {}

    def place(self, index: int) -> None:
        """Decide what computes a node."""
        node = self._graph.nodes[index]
        if node.func is None:
            self._input(index, node)
            return
        taken = [ref.index for ref in node.refs()]
        if not node.symbols() and all(self._is_fixed(i) for i in taken):
            self._tensors[index] = None
            return
        try:
            found = self._loop_value(index, node)
        except Unfusable:
            found = None
        if found is not None:
            self._values[index] = found
        elif index not in self._stacks and index not in self._reductions:
            self._tensors[index] = max((self._ready(i) for i in taken), default=0)

    def need(self, index: int) -> None:
        """Make sure that a node's tensor is there: computed in the prologue, stored by a loop, or by torch between."""
        node = self._graph.nodes[index]
        if index in self._done or node.func is None:
            return
        self._done.add(index)
        if index in self._reductions:
            for store in self._reductions[index]:
                self._store(store)
        elif index in self._stacks:
            assert node.shape is not None
            for part, value in enumerate(self._stacks[index]):
                self._store(Store(value, self._placed(node.shape[1:]), index, part))
        elif index in self._values:
            self._store(Store(self._values[index], self._placed(node.shape), index))
        else:
            stage = self._tensors[index]
            if stage is None:
                self.prologue.add(index)
            else:
                self._stage(stage).eager.append(index)
                if self._on_block(node):
                    self.between[node.name.removeprefix("aten.").removesuffix(".default")] = None
            for ref in node.refs():
                self.need(ref.index)

    def _on_block(self, node: Node) -> bool:
        shapes = [node.shape, *(self._graph.nodes[ref.index].shape for ref in node.refs())]
        return node.name not in _SAME and any(self._placed(shape) == "element" for shape in shapes)

    def _store(self, store: Store) -> None:
        # a mistake here would write beyond the tensor
        counts = store.reduce in ("count", "count few")
        assert counts or store.value.dtype == self._graph.nodes[store.target].dtype
        self._stage(store.value.stage).stores.append(store)
        for source in _sources(store.value, set()):
            self.need(source)

    def _stage(self, number: int) -> Stage:
        return self.stages.setdefault(number, Stage())

    def _input(self, index: int, node: Node) -> None:
        kind = self.forms[index].kind
        place = {"block": "element", "rows": "row", "scalar": "scalar"}.get(kind)
        one = kind != "rows" or self.forms[index].shape in ((), (1,))
        if place and one and node.dtype in _STORED and (place != "row" or self._graph.columns):
            assert node.dtype is not None
            self._values[index] = Value("load", (), node.dtype, place, source=index)
        else:
            # inputs are there from the start: fixed ones for the tensor, others for the block
            self._tensors[index] = None if kind == "fixed" else 0

    def _is_fixed(self, index: int) -> bool:
        return self._tensors.get(index, -1) is None

    def _ready(self, index: int) -> int:
        """Return the stage at whose end a node's tensor is there."""
        if index in self._reductions:
            return max(store.value.stage for store in self._reductions[index])
        if index in self._stacks:
            return max(value.stage for value in self._stacks[index])
        if index in self._values:
            return self._values[index].stage
        return self._tensors[index] or 0

    def _unique(self, value: Value) -> Value:
        """Return the first value that is computed alike."""
        args = tuple(id(arg) if isinstance(arg, Value) else (type(arg), repr(arg)) for arg in value.args)
        return self._same.setdefault((value.name, args, value.dtype, value.place, value.operands, value.source), value)

    def _placed(self, shape: Any) -> str:
        """Return the place of values in this shape; an empty text for other shapes."""
        return _place(shape, self._graph.columns) or ""

    def _loop_value(self, index: int, node: Node) -> Value | None:
        """Return a node as a value of loops; None if it is none, or was entered as a stack or a reduction."""
        name, dtype = node.name, node.dtype
        if dtype not in _STORED or node.shape is None:
            return None
        place = self._placed(node.shape)
        if self._reduces(index, node):
            return None
        if name == "aten.stack.default":
            self._stack(index, node)
            return None
        if name == "merganser.count.default":
            self._counts(index, node)
            return None
        if name == "merganser.place.default" and place == "element":
            value = self._made(name, tuple(map(self._operand, node.args)), dtype, place)
            self._reductions[index] = (Store(value, place, index, reduce="place"),)
            return None
        folded = self._folded(node, place)
        if folded is not None or not place:
            return folded
        if name in _FILLED or name in _FULL:
            return self._filled(node, place)
        if name == "aten.arange.default":
            return self._index(node, place)
        if name in _SAME:
            return self._operand(node.args[0])  # type: ignore[no-any-return]
        if name not in ELEMENTWISE or node.symbols():
            return None
        args = tuple(self._operand(arg) for arg in node.args if not isinstance(arg, torch.dtype))
        if not computes(node, [arg.dtype if isinstance(arg, Value) else None for arg in args]):
            return None
        return self._made(name, args, dtype, place, node.operands)

    def _made(
        self, name: str, args: tuple[Any, ...], dtype: torch.dtype, place: str, operands: torch.dtype | None = None
    ) -> Value:
        stage = max((arg.stage for arg in args if isinstance(arg, Value)), default=0)
        return self._unique(Value(name, args, dtype, place, operands, stage=stage))

    def _operand(self, arg: Any) -> Any:
        """Return an argument as a value of loops.

        Raises:
            Unfusable: It cannot be one.
        """
        if not isinstance(arg, Ref):
            if isinstance(arg, (Symbol, tuple)):
                raise Unfusable("a size of the block as a number")
            return arg
        node = self._graph.nodes[arg.index]
        if arg.index in self._values:
            return self._values[arg.index]
        if node.dtype not in _STORED or node.shape is None:
            raise Unfusable("no tensor")
        place = self._placed(node.shape)
        stage = 0
        if self._is_fixed(arg.index):
            if all(size == 1 for size in node.shape):
                place = "fixed"
            elif self._graph.columns and node.shape in ((self._graph.columns,), (1, self._graph.columns)):
                place = "column"
            else:
                raise Unfusable("a tensor of another shape")
        elif place in ("row", "element") and arg.index not in self._stacks:
            stage = self._ready(arg.index) + 1
        else:
            raise Unfusable("a tensor of another shape, or a number that torch computes per block")
        return self._unique(Value("load", (), node.dtype, place, source=arg.index, stage=stage))

    def _filled(self, node: Node, place: str) -> Value | None:
        if node.name in _FILLED:
            number: Any = _FILLED[node.name]
        else:
            number = node.args[2 if node.name == "aten.new_full.default" else 1]
        assert node.dtype is not None
        if isinstance(number, (Ref, Symbol)):
            return None
        return self._unique(Value("constant", (number,), node.dtype, place))

    def _index(self, node: Node, place: str) -> Value | None:
        """Return the index of every element in a flat block."""
        integer = node.dtype in (torch.int32, torch.int64)
        assert node.dtype is not None
        return self._unique(Value("index", (), node.dtype, place)) if node.args == (SIZE,) and integer else None

    def _reduces(self, index: int, node: Node) -> bool:
        """Enter a reduction of elements; return whether this is one."""
        if node.name not in (*_TOTALS, *_OF_ROWS) or not isinstance(node.args[0], Ref) or node.dtype is None:
            return False
        if node.args[0].index not in self._values:
            return False
        value = self._values[node.args[0].index]
        given = self._graph.nodes[node.args[0].index]
        if value.place != "element" or self._placed(given.shape) != "element":
            return False
        dims = tuple(node.args[1]) if len(node.args) > 1 else ()
        over = "row" if dims in ((1,), (-1,)) and given.shape == (ROWS, self._graph.columns) else None
        over = "block" if not dims and node.shape == () else over
        how = (_TOTALS if over == "block" else _OF_ROWS).get(node.name) if over else None
        # torch adds float32 in an order of its own, which would show in the result
        exact = (torch.float64, torch.int64) if how == "sum" else (torch.float32, torch.float64)
        if how is None or node.dtype not in exact:
            return False
        value = self._made("aten._to_copy.default", (value,), node.dtype, "element") if how == "sum" else value
        self._reductions[index] = (Store(value, "element", index, reduce=how, over=over or "block"),)
        return True

    def _counts(self, index: int, node: Node) -> None:
        """Enter histograms of elements."""
        parts, _, few = node.args
        shapes = [self._graph.nodes[part.index].shape for part in parts]
        if all(part.index in self._values for part in parts) and all(self._placed(own) == "element" for own in shapes):
            how = "count few" if few else "count"
            self._reductions[index] = tuple(
                Store(self._values[part.index], "element", index, i, how) for i, part in enumerate(parts)
            )

    def _stack(self, index: int, node: Node) -> None:
        """Enter a stack of elements or rows along a new first dimension, where that is one."""
        dim = node.args[1] if len(node.args) > 1 else (node.kwargs or {}).get("dim", 0)
        parts = node.args[0]
        shapes = {self._graph.nodes[part.index].shape for part in parts}
        place = self._placed(shapes.pop()) if dim == 0 and len(shapes) == 1 else ""
        if place not in ("element", "row") or not all(part.index in self._values for part in parts):
            return
        dtype, values = node.dtype, [self._values[part.index] for part in parts]
        assert dtype is not None
        if all(converts(value.dtype, dtype) for value in values):
            # torch stacks numbers of several dtypes in one that holds all
            self._stacks[index] = tuple(
                value if value.dtype == dtype else self._made("aten._to_copy.default", (value,), dtype, place)
                for value in values
            )

    def _folded(self, node: Node, place: str) -> Value | None:
        """Return one part of a stack, or the largest entry of its parts."""
        if not node.args or not isinstance(node.args[0], Ref) or node.args[0].index not in self._stacks:
            return None
        parts = self._stacks[node.args[0].index]
        if node.name == "aten.select.int" and node.args[1] == 0:
            index: int = node.args[2]
            return parts[index]
        # a sum of parts is none: torch adds them in an order of its own
        if node.name != "aten.amax.default" or node.args[1:] != ((0,),) or not place or node.dtype not in FLOATS:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = self._made("aten.maximum.default", (total, part), part.dtype, place, part.dtype)
        return total


def _place(shape: Any, columns: int | None) -> str | None:
    """Return the place of values in this shape; None for other shapes."""
    if shape == (SIZE,) or (columns is not None and shape == (ROWS, columns)):
        return "element"
    if columns is not None and shape in ((ROWS,), (ROWS, 1)):
        return "row"
    return "scalar" if shape == () else None


def _sources(value: Value, seen: set[Value]) -> Iterator[int]:
    """Yield the nodes whose tensors a value is computed from."""
    if value in seen:
        return
    seen.add(value)
    if value.source is not None:
        yield value.source
    for arg in value.args:
        if isinstance(arg, Value):
            yield from _sources(arg, seen)
