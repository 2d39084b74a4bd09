"""Record the operations of a function as a graph.

The function runs twice, on blocks of different sizes and with different numbers in them. What differs between the two
recordings must be a size of the block; everything else is the same for all blocks. A function whose operations depend on
the size of the block in another way, or on values of tensors, has no such graph.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import ROWS, SIZE, Graph, Node, Ref, Symbol, Unfusable

# Sizes of the two recordings. They are far apart, so that a function that treats small blocks in a way of their own is noticed. A
# single row is special in some operations of torch, such as a reshape, which is then no copy: if that makes a difference, the
# graph holds from two rows on.
_SIZES = ((24, 1040),)
_ROWS = ((1, 3), (2, 5))

# what reads the numbers of a tensor without an operation that could be recorded
_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.data_ptr)


_DEPENDS = "its operations depend on the size of the block, or on values"


class Form(NamedTuple):
    """The form of a function's input.

    Args:
        kind: "block", an input in the shape of the block; "rows", with an entry per row of the block; "scalar", one
            number that differs from block to block; "fixed", the same for all blocks of a tensor.
        dtype: Its dtype.
        shape: Its shape; for "rows" that of one entry; without meaning for "block".
    """

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()


def trace(function: Callable[..., Sequence[Tensor]], forms: Sequence[Form], columns: int | None) -> Graph:
    """Record a function.

    Args:
        function: Called with one tensor per form; returns tensors.
        forms: Forms of its inputs.
        columns: Length of the rows of blocks, which are then matrices; None: blocks are flat.

    Raises:
        Unfusable: Its operations depend on the size of the block or on values.
    """
    *others, last = _SIZES if columns is None else _ROWS
    for sizes in others:
        with contextlib.suppress(Unfusable):
            return _trace(function, forms, columns, sizes)
    return _trace(function, forms, columns, last)


def _trace(
    function: Callable[..., Sequence[Tensor]], forms: Sequence[Form], columns: int | None, sizes: tuple[int, int]
) -> Graph:
    recorders = []
    for size, fill in zip(sizes, (_zeros, _numbers), strict=True):
        # what is read is read in both recordings
        guard: Any = _NoReading() if fill is _zeros else contextlib.nullcontext()
        shape = (size,) if columns is None else (size, columns)
        inputs = [fill(_shape(form, shape), form.dtype, i) for i, form in enumerate(forms)]
        recorder = _Recorder(inputs)
        try:
            with recorder, guard:
                outputs = [*function(*inputs)]
            recorders.append((recorder, [recorder.ref(output) for output in outputs]))
        except Unfusable:
            raise
        except Exception as error:
            raise Unfusable(f"it fails on a small block: {error}") from error
    (first, found), (second, same) = recorders
    if found != same or len(first.nodes) != len(second.nodes):
        raise Unfusable(_DEPENDS)
    joined = _Sizes(columns, sizes)
    nodes = [joined.join(a, b) for a, b in zip(first.nodes, second.nodes, strict=True)]
    return Graph(tuple(nodes), len(forms), tuple(found), columns, 1 if columns is None else sizes[0])


def _shape(form: Form, block: tuple[int, ...]) -> tuple[int, ...]:
    if form.kind == "block":
        return block
    return (block[0], *form.shape) if form.kind == "rows" else form.shape


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, _: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Tensor:
    """Return numbers from [0, 1) that differ from entry to entry and from input to input; of whole ones 0 and 1."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64) * 0.618 + 0.37 * (index + 1)
    found = steps.frac() if dtype.is_floating_point else (2 * steps.frac()).to(torch.int64)
    return found.to(dtype).view(shape)


class _NoReading(TorchFunctionMode):
    """Refuses what would read numbers of the small block, which are not those of any other."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch.

        Raises:
            Unfusable: It reads numbers.
        """
        if func in _READS:
            raise Unfusable(f"{func.__name__} looks at values")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Records the operations inside a `with` block, with the sizes of this run.

    Args:
        inputs: The first nodes.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        # tensors are kept, so that no other one gets their id
        self._known: dict[int, tuple[Tensor, Ref | None]] = {}
        # storages of tensors that were not made in here
        self._outside: set[int] = set()
        for tensor in inputs:
            self._enter(Node(None, "input", dtype=tensor.dtype, shape=tuple(tensor.shape)), tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled by torch in here, and skipping that would import it: 1.4 s
        return False

    def ref(self, tensor: Tensor) -> Ref:
        """Return the node that computed a tensor; one from elsewhere becomes a node that holds it."""
        if id(tensor) not in self._known:
            kept = tensor.detach().clone()
            return self._enter(
                Node(lambda: kept, f"constant {kept.tolist()}", dtype=tensor.dtype, shape=tuple(tensor.shape)), tensor
            )
        ref = self._known[id(tensor)][1]
        if ref is None:
            raise Unfusable("a view is used after the tensor that it views was changed in place")
        return ref

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and record it."""
        kwargs = dict(kwargs or {})
        taken = tuple(self._encode(arg) for arg in args)
        named = {name: self._encode(value) for name, value in kwargs.items()}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unfusable(f"{func} draws random numbers of torch")
        if func._schema.is_mutable:
            return self._change(func, args, kwargs, taken, named)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            node = Node(func, str(func), taken, named, result.dtype, tuple(result.shape), _operands(args))
            self._add(node, result)
            if func is torch.ops.aten.lift_fresh.default:
                # what torch.tensor has made in here
                self._outside.discard(result.untyped_storage()._cdata)
        elif isinstance(result, (tuple, list)):
            several = Ref(len(self.nodes))
            self.nodes.append(Node(func, str(func), taken, named))
            for i, part in enumerate(result):
                node = Node(operator.getitem, "getitem", (several, i), {}, part.dtype, tuple(part.shape))
                self._add(node, part)
        else:
            name = "item" if func is torch.ops.aten._local_scalar_dense.default else func
            raise Unfusable(f"{name} looks at values")
        return result

    def _add(self, node: Node, tensor: Tensor) -> Ref:
        ref = Ref(len(self.nodes))
        self.nodes.append(node)
        self._known[id(tensor)] = (tensor, ref)
        return ref

    def _enter(self, node: Node, tensor: Tensor) -> Ref:
        """Add a tensor that was not made in here."""
        self._outside.add(tensor.untyped_storage()._cdata)
        return self._add(node, tensor)

    def _change(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], taken: tuple[Any, ...], named: Any
    ) -> Tensor:
        """Run an operation in place, and record one that makes a new tensor, which takes the old one's name."""
        target, name, pure = args[0], str(func), _without_change(func)
        storage = target.untyped_storage()
        whole = target.is_contiguous() and storage.nbytes() == target.nbytes
        if pure is None or storage._cdata in self._outside or not whole:
            raise Unfusable(f"{name} changes a part of a tensor, or one that it was given")
        operands = _operands(args)
        if name == "aten.copy_.default":
            if args[1].shape != target.shape:
                raise Unfusable("copy_ of another shape")
            taken, named, operands = (taken[1],), {"dtype": target.dtype}, None
        elif pure(*args, **kwargs).dtype != target.dtype:
            raise Unfusable(f"{name} converts its result")
        result: Tensor = func(*args, **kwargs)
        for key, (tensor, _) in list(self._known.items()):
            if tensor is not target and tensor.untyped_storage()._cdata == storage._cdata:
                self._known[key] = (tensor, None)
        self._add(Node(pure, str(pure), taken, named, target.dtype, tuple(target.shape), operands), target)
        return result

    def _encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._encode(part) for part in value)
        return value


def _without_change(func: Any) -> Any:
    """Return the operation that computes the same without changing its first argument, or None."""
    name = func._schema.name.removeprefix("aten::")
    if name == "copy_":
        return torch.ops.aten._to_copy.default
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    # overloads of the two need not have the same names: pow_.Scalar is pow.Tensor_Scalar
    overloads = () if packet is None else (getattr(packet, each) for each in packet.overloads())
    return next((pure for pure in overloads if _types(pure) == _types(func) and not pure._schema.is_mutable), None)


def _types(func: Any) -> list[str]:
    return [str(argument.type) for argument in func._schema.arguments]


def _operands(args: Sequence[Any]) -> torch.dtype | None:
    """Return the dtype in which the operands of an elementwise operation meet."""
    operands = [arg for arg in args[:2] if isinstance(arg, (Tensor, int, float))]
    if len(operands) != 2 or not any(isinstance(arg, Tensor) for arg in operands):
        return None
    return torch.result_type(*operands)  # type: ignore[arg-type]


class _Sizes:
    """Finds the sizes of the block in two recordings."""

    def __init__(self, columns: int | None, runs: tuple[int, int]) -> None:
        self._runs = runs
        self._one = SIZE if columns is None else ROWS
        self._columns = columns

    def join(self, first: Node, second: Node) -> Node:
        """Return one node for both recordings."""
        same = (first.name, first.dtype, first.operands) == (second.name, second.dtype, second.operands)
        if not same or set(first.kwargs or {}) != set(second.kwargs or {}):
            raise Unfusable(_DEPENDS)
        named = {name: self._value(value, (second.kwargs or {})[name]) for name, value in (first.kwargs or {}).items()}
        args, shape = self._value(first.args, second.args), self._value(first.shape, second.shape)
        return Node(first.func, first.name, args, named, first.dtype, shape, first.operands)

    def _value(self, first: Any, second: Any) -> Any:
        if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
            return tuple(self._value(a, b) for a, b in zip(first, second, strict=True))
        if type(first) is type(second) and (first == second or (first != first and second != second)):
            return first
        times, rest = divmod(first, self._runs[0]) if isinstance(first, int) else (0, 1)
        if rest or not times or second != times * self._runs[1]:
            raise Unfusable(_DEPENDS)
        return SIZE if times == self._columns and times > 1 else Symbol(self._one.name, times)
