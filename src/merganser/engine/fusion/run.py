"""Run a lowered function: the prologue once per tensor, the loops for each block."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .emit import NAME, Source, write
from .graph import Graph, Node, Ref, Symbol
from .lower import lower
from .machine import Function
from .parts import Stage, Store
from .trace import Form, trace
from .vectors import LANES


class Program:
    """A function whose operations on elements are loops in machine code.

    Args:
        function: Called with one tensor per form; returns tensors. It runs on small tensors now, to be recorded.
        forms: Forms of its inputs.
        columns: Length of the rows of blocks; None: blocks are flat.

    Attributes:
        between: Names of the operations on elements that torch runs, between loops.
        lowered: The divided function.
        loops: A loop for each stage.
        inputs: The inputs that differ from block to block.
        first: The first input in the shape of the block.
        kept: Nodes that torch takes for each block, and results.
        wrapped: Inputs that are numbers, and that torch takes.
        counts: The first result, if it is a histogram.

    Raises:
        Unfusable: The function cannot be recorded, or no loop can be made of it.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], forms: Sequence[Form], columns: int | None = None
    ) -> None:
        self.lowered = lowered = lower(trace(function, forms, columns), forms)
        self.loops = [_Loop(lowered.graph, stage) for stage in lowered.stages]
        self.between, nodes = lowered.between, lowered.graph.nodes
        self._prologue = [(i, nodes[i], [ref.index for ref in nodes[i].refs()]) for i in lowered.prologue]
        self._before: dict[int, Any] = {}
        self._taken: dict[tuple[int, ...], bool] = {}
        self.inputs = [i for i, form in enumerate(forms) if form.kind != "fixed"]
        self.first = next(i for i, form in enumerate(forms) if form.kind == "block")
        taken = {ref.index for stage in lowered.stages for i in stage.eager for ref in nodes[i].refs()}
        self.kept = taken | {ref.index for ref in lowered.graph.outputs}
        self.wrapped = [i for i, form in enumerate(forms) if form.kind == "scalar" and i in taken]
        result = lowered.graph.outputs[0].index
        stores = [store for stage in lowered.stages for store in stage.stores if store.target == result]
        self.counts = result if any(store.reduce in ("count", "count few") for store in stores) else None

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Return whether loops can run over blocks of a shape: those with fewer numbers than a vector are too short."""
        if shape not in self._taken:
            size = math.prod(shape)
            enough = size >= LANES and shape[0] >= self.lowered.graph.least
            self._taken[shape] = enough and all(size // shape[0] >= LANES or loop.flat for loop in self.loops)
        return self._taken[shape]

    def bind(self, fixed: Sequence[Tensor]) -> Bound:
        """Compute what is the same for all blocks of a tensor.

        Args:
            fixed: The inputs of the form "fixed", in order. What follows from those that were handed in for the tensor before
                is not computed again.
        """
        before, given = self._before, iter(fixed)
        known: dict[int, Any] = {i: next(given) for i, form in enumerate(self.lowered.forms) if form.kind == "fixed"}
        same = {i for i, tensor in known.items() if before.get(i) is tensor}
        for index, node, taken in self._prologue:
            if index in before and same.issuperset(taken):
                known[index] = before[index]
                same.add(index)
            else:
                known[index] = _compute(node, known, {})
        self._before = known
        return Bound(self, known)


class Bound:
    """A program with all that is fixed for one tensor. Several threads may call it at once."""

    def __init__(self, program: Program, known: Mapping[int, Any]) -> None:
        self._program = program
        self._loops = [
            (loop, loop.fixed(known), stage.eager)
            for loop, stage in zip(program.loops, program.lowered.stages, strict=True)
        ]
        self._known = {index: tensor for index, tensor in known.items() if index in program.kept}

    def __call__(self, inputs: Sequence[Tensor | int], counts: Tensor | None = None) -> list[Tensor]:
        """Run on one block.

        Args:
            inputs: The inputs whose form is not "fixed", in order; numbers where the form is "scalar".
            counts: If the first result is a histogram, it is added to this one, from an earlier block, and is this.
        """
        program = self._program
        nodes = program.lowered.graph.nodes
        known = {**self._known, **dict(zip(program.inputs, inputs, strict=True))}
        sizes = {"size": known[program.first].numel(), "rows": known[program.first].shape[0]}
        for index in program.wrapped:
            known[index] = torch.tensor(known[index], dtype=nodes[index].dtype)
        if counts is not None and program.counts is not None:
            known[program.counts] = counts
        for loop, fixed, eager in self._loops:
            loop.run(known, sizes, fixed)
            for index in eager:
                known[index] = _compute(nodes[index], known, sizes)
        return [known[output.index] for output in program.lowered.graph.outputs]


class _Loop:
    """The loop of one stage, if it has one."""

    def __init__(self, graph: Graph, stage: Stage) -> None:
        self._graph = graph
        self._stores = stage.stores
        counted = {store.target for store in stage.stores if store.reduce in ("count", "count few")}
        targets = dict.fromkeys(store.target for store in stage.stores)
        self._targets = [(target, graph.nodes[target], target in counted) for target in targets]

    @property
    def flat(self) -> bool:
        """Whether the rows of blocks do not matter."""
        source = self._built[0]
        return source is None or source.flat

    @cached_property
    def _built(self) -> tuple[Source | None, Function | None]:
        """The instructions and the machine code, made when they are needed for the first time."""
        if not self._stores:
            return None, None
        source = write(self._stores)
        return source, Function(source.text, NAME)

    def fixed(self, known: Mapping[int, Any]) -> tuple[array[int], dict[int, Tensor]]:
        """Return the fixed numbers, eight bytes each, and the fixed tensors that are read by column."""
        source = self._built[0]
        if source is None:
            return array("q"), {}
        kinds = "".join("d" if known[index].is_floating_point() else "q" for index in source.fixed)
        numbers = array("q", struct.pack(f"={kinds}", *(known[index].item() for index in source.fixed)))
        return numbers, {index: known[index].contiguous() for index in source.arrays if index in known}

    def run(self, known: dict[int, Any], sizes: Mapping[str, int], fixed: tuple[array[int], dict[int, Tensor]]) -> None:
        """Run the loop on a block, and enter what it has made."""
        source, function = self._built
        if source is None or function is None:
            return
        numbers, columns = fixed
        for target, node, starts_at_0 in self._targets:
            if target not in known:
                known[target] = (torch.zeros if starts_at_0 else torch.empty)(
                    _sized(node.shape, sizes), dtype=node.dtype
                )
        arrays = [columns[index] if index in columns else known[index] for index in source.arrays]
        arrays = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in arrays]
        rows = 1 if source.flat else sizes["rows"]
        words = array("q", [rows, sizes["size"] // rows])
        words.extend(int(known[index]) for index in source.scalars)
        words.extend(tensor.data_ptr() for tensor in arrays)
        words.extend(self._address(store, known[store.target], sizes) for store in source.stores)
        function(words.buffer_info()[0], numbers.buffer_info()[0])

    def _address(self, store: Store, tensor: Tensor, sizes: Mapping[str, int]) -> int:
        if not store.part:
            return tensor.data_ptr()
        return tensor.data_ptr() + store.part * (tensor.nbytes // tensor.shape[0])


def _compute(node: Node, known: Mapping[int, Any], sizes: Mapping[str, int]) -> Any:
    """Run an operation in torch."""
    assert node.func is not None
    named = {name: _filled(value, known, sizes) for name, value in (node.kwargs or {}).items()}
    return node.func(*_filled(node.args, known, sizes), **named)


def _filled(value: Any, known: Mapping[int, Any], sizes: Mapping[str, int]) -> Any:
    if isinstance(value, Ref):
        return known[value.index]
    if isinstance(value, Symbol):
        return value.of(sizes)
    return tuple(_filled(part, known, sizes) for part in value) if isinstance(value, tuple) else value


def _sized(shape: Any, sizes: Mapping[str, int]) -> list[int]:
    return [size.of(sizes) if isinstance(size, Symbol) else size for size in shape]
