"""Write a loop as LLVM instructions.

The function that is made takes two addresses: of whole numbers that differ from block to block (rows, columns, the scalars
of the block, the addresses of tensors), and of the numbers that are fixed for a tensor, eight bytes each. It runs over the
rows of the block, and in each row over its columns, 16 at a time:

    entry     what is fixed: read, converted, and whatever follows from it alone
    row       what has one value per row
    column    what has one value per element, and the writing of results
    end       partial sums become sums, and numbers of the whole block are written

Values are emitted at the outermost of these places where all they need is known. At the end of a row the last 16 columns
are taken, some of which may have been done before: writing the same again changes nothing, and sums leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
import torch

from .arithmetic import Arg, Typed, emit, larger
from .parts import Store, Value
from .vectors import LANES, constant, convert, lane, splat, stored, vector

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_ENTRY, _ROW, _COLUMN = 0, 1, 2
_WHERE = {"fixed": _ENTRY, "scalar": _ENTRY, "row": _ROW, "column": _COLUMN, "element": _COLUMN}
NAME = "loop"


@dataclass(frozen=True, slots=True)
class Source:
    """The instructions of a loop, and what it is called with.

    Args:
        text: LLVM's assembly language.
        flat: The rows of the block do not matter: it is called with one row.
        scalars: Nodes whose numbers differ from block to block.
        arrays: Nodes whose tensors are read, and then stores, in the order of their addresses.
        stores: What is written.
        fixed: Nodes whose numbers are fixed, in order.
    """

    text: str
    flat: bool
    scalars: tuple[int, ...]
    arrays: tuple[int, ...]
    stores: tuple[Store, ...]
    fixed: tuple[int, ...]


def write(stores: Sequence[Store]) -> Source:
    """Write the loop that makes these stores."""
    return _Writer(stores).write()


class _Writer:
    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = tuple(stores)
        values = _ordered([store.value for store in stores])
        loads = [value for value in values if value.name == "load"]
        self._scalars = [value for value in loads if value.place == "scalar"]
        self._fixed = [value for value in loads if value.place == "fixed"]
        self._arrays = [value for value in loads if value.place in ("row", "column", "element")]
        self._depth: dict[int, int] = {}
        for value in values:
            self._depth[id(value)] = self._depth_of(value)
        self._values = values
        self._emitted: dict[int, Any] = {}
        self._indices: dict[str, Any] = {}

    def write(self) -> Source:
        module = ir.Module(NAME)
        # the triple and the layout of data are set by the machine
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.PointerType(), ir.PointerType()]), NAME)
        for argument in function.args:
            argument.add_attribute("noalias")
        names = ("entry", "row", "column", "row_end", "end")
        self._blocks = {name: function.append_basic_block(name) for name in names}
        entry, row, column, row_end, end = (ir.IRBuilder(self._blocks[name]) for name in names)
        self._entry(entry, *function.args)
        entry.branch(self._blocks["row"])
        self._row(row)
        row.branch(self._blocks["column"])
        self._column(column)
        self._row_end(row_end)
        self._end(end)
        return Source(
            str(module),
            all(value.place == "element" for value in self._arrays)
            and all(store.place in ("element", "scalar") and store.over == "block" for store in self._stores),
            tuple(_source(value) for value in self._scalars),
            tuple(_source(value) for value in self._arrays),
            self._stores,
            tuple(_source(value) for value in self._fixed),
        )

    def _entry(self, b: Any, block: Any, fixed: Any) -> None:
        def word(base: Any, index: int, of: Any = _I64) -> Any:
            place = b.gep(base, [ir.Constant(_I64, index)], source_etype=_I64)
            return b.load(place, align=8, typ=of)

        self._n_rows, self._n_columns = word(block, 0), word(block, 1)
        self._last = b.sub(self._n_columns, ir.Constant(_I64, LANES))
        for i, value in enumerate(self._scalars):
            self._emitted[id(value)] = convert(b, _spread(b, word(block, 2 + i)), torch.int64, value.dtype)
        first = 2 + len(self._scalars)
        addresses = [word(block, first + i, ir.PointerType()) for i in range(len(self._arrays) + len(self._stores))]
        self._read = {id(value): address for value, address in zip(self._arrays, addresses, strict=False)}
        self._written = addresses[len(self._arrays) :]
        # room for the numbers that are counted one by one
        self._room = {i: b.alloca(vector(_I32)) for i, _ in self._counted()}
        for i, value in enumerate(self._fixed):
            wide = torch.float64 if value.dtype.is_floating_point else torch.int64
            self._emitted[id(value)] = convert(b, _spread(b, word(fixed, i, lane(wide))), wide, value.dtype)
        self._emit_all(b, _ENTRY)

    def _row(self, b: Any) -> None:
        self._r = b.phi(_I64)
        self._r.add_incoming(ir.Constant(_I64, 0), self._blocks["entry"])
        # sums of the block go on from row to row
        self._totals = {i: self._carried(b, store, "entry") for i, store in self._reductions("block")}
        self._start = b.mul(self._r, self._n_columns)
        self._emit_all(b, _ROW)

    def _column(self, b: Any) -> None:
        self._c = b.phi(_I64)
        self._c.add_incoming(ir.Constant(_I64, 0), self._blocks["row"])
        carried: dict[int, Any] = {}
        for i, store in enumerate(self._stores):
            if store.reduce in ("sum", "max"):
                carried[i] = b.phi(vector(lane(_dtype(store))))
                start = self._totals[i] if store.over == "block" else _neutral(store)
                carried[i].add_incoming(start, self._blocks["row"])
        beyond = b.icmp_signed(">", self._c, self._last)
        self._at = b.select(beyond, self._last, self._c)
        self._index = b.add(self._start, self._at)
        self._emit_all(b, _COLUMN)
        # elements that an earlier step has done
        done = b.sub(self._c, self._at)
        fresh = b.icmp_signed(">=", _lanes(_I32), _spread(b, b.trunc(done, _I32)))
        self._sums = {i: self._accumulate(b, self._stores[i], total, fresh) for i, total in carried.items()}
        for i, store in enumerate(self._stores):
            if store.reduce == "place":
                row = b.gep(self._written[i], [self._start], source_etype=stored(_dtype(store)))
                columns, found = (self._emitted[id(arg)] for arg in store.value.args)
                self._place(b, columns, found, _dtype(store), row)
            elif not store.reduce and store.place == "element":
                self._put(b, self._emitted[id(store.value)], _dtype(store), self._written[i], self._index)
        self._count(b, done, fresh)
        following = b.add(self._c, ir.Constant(_I64, LANES))
        self._c.add_incoming(following, b.block)
        for i, total in carried.items():
            total.add_incoming(self._sums[i], b.block)
        more = b.icmp_signed("<", following, self._n_columns)
        b.cbranch(more, self._blocks["column"], self._blocks["row_end"])

    def _row_end(self, b: Any) -> None:
        for i, store in enumerate(self._stores):
            if store.reduce and store.over == "row":
                self._put_one(b, _total(b, store, self._sums[i]), _dtype(store), self._written[i], self._r)
            elif not store.reduce and store.place == "row":
                one = b.extract_element(self._emitted[id(store.value)], ir.Constant(_I32, 0))
                self._put_one(b, one, _dtype(store), self._written[i], self._r)
        following = b.add(self._r, ir.Constant(_I64, 1))
        self._r.add_incoming(following, self._blocks["row_end"])
        for i, total in self._totals.items():
            total.add_incoming(self._sums[i], self._blocks["row_end"])
        b.cbranch(b.icmp_signed("<", following, self._n_rows), self._blocks["row"], self._blocks["end"])

    def _end(self, b: Any) -> None:
        for i, store in self._reductions("block"):
            total = _total(b, store, self._sums[i])
            self._put_one(b, total, _dtype(store), self._written[i], ir.Constant(_I64, 0))
        for i, store in enumerate(self._stores):
            if not store.reduce and store.place == "scalar":
                one = b.extract_element(self._emitted[id(store.value)], ir.Constant(_I32, 0))
                self._put_one(b, one, _dtype(store), self._written[i], ir.Constant(_I64, 0))
        b.ret_void()

    def _reductions(self, over: str) -> list[tuple[int, Store]]:
        joined = ("sum", "max")
        return [(i, store) for i, store in enumerate(self._stores) if store.reduce in joined and store.over == over]

    def _counted(self) -> list[tuple[int, Store]]:
        return [(i, store) for i, store in enumerate(self._stores) if store.reduce in ("count", "count few")]

    def _count(self, b: Any, done: Any, fresh: Any) -> None:
        """Add the numbers of this step to histograms; the builder then stands behind that."""
        few, many = [], []
        for i, store in self._counted():
            codes = convert(b, self._emitted[id(store.value)], _dtype(store), torch.int32)
            b.store(codes, self._room[i], align=4)
            if store.reduce == "count":
                many.append(i)
            else:
                few.append((i, b.and_(fresh, b.icmp_signed(">=", codes, splat(_I32, 0)))))
        if many:
            self._count_all(b, many, done)
        for i, mask in few:
            self._count_few(b, i, b.bitcast(mask, ir.IntType(LANES)))

    def _count_all(self, b: Any, histograms: Sequence[int], done: Any) -> None:
        """Count every number: a loop over the 16, which leaves out those that were done before."""
        before, loop, after = b.block, b.append_basic_block("count"), b.append_basic_block("counted")
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(_I64)
        at.add_incoming(done, before)
        for i in histograms:
            self._increment(b, i, at)
        following = b.add(at, ir.Constant(_I64, 1))
        at.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, ir.Constant(_I64, LANES)), loop, after)
        b.position_at_end(after)

    def _count_few(self, b: Any, i: int, mask: Any) -> None:
        """Count the numbers whose bits are set in a mask: a loop over these, mostly skipped."""
        before, loop, after = b.block, b.append_basic_block("few"), b.append_basic_block("counted")
        none = ir.Constant(mask.type, 0)
        b.cbranch(b.icmp_unsigned("!=", mask, none), loop, after)
        b.position_at_end(loop)
        left = b.phi(mask.type)
        left.add_incoming(mask, before)
        self._increment(b, i, b.zext(b.cttz(left, ir.Constant(ir.IntType(1), 1)), _I64))
        rest = b.and_(left, b.sub(left, ir.Constant(mask.type, 1)))
        left.add_incoming(rest, loop)
        b.cbranch(b.icmp_unsigned("!=", rest, none), loop, after)
        b.position_at_end(after)

    def _increment(self, b: Any, i: int, at: Any) -> None:
        code = b.load(b.gep(self._room[i], [at], source_etype=_I32), align=4, typ=_I32)
        place = b.gep(self._written[i], [b.zext(code, _I64)], source_etype=_I64)
        b.store(b.add(b.load(place, align=8, typ=_I64), ir.Constant(_I64, 1)), place, align=8)

    def _carried(self, b: Any, store: Store, source: str) -> Any:
        total = b.phi(vector(lane(_dtype(store))))
        total.add_incoming(_neutral(store), self._blocks[source])
        return total

    def _depth_of(self, value: Value) -> int:
        if value.name in ("load", "index"):
            return _WHERE[value.place]
        return max((self._depth[id(arg)] for arg in value.args if isinstance(arg, Value)), default=_ENTRY)

    def _emit_all(self, b: Any, depth: int) -> None:
        """Emit the values that are known at a place and not before."""
        for value in self._values:
            if self._depth[id(value)] == depth and id(value) not in self._emitted:
                self._emitted[id(value)] = self._emit(b, value)

    def _emit(self, b: Any, value: Value) -> Any:
        if value.name == "constant":
            return constant(value.args[0], value.dtype)
        if value.name == "index":
            whole = lane(value.dtype)
            first = self._index if whole.width == 64 else b.trunc(self._index, whole)
            return b.add(_spread(b, first), _lanes(whole))
        if value.name == "load":
            return self._get(b, value)
        if value.name == "merganser.place.default":
            return None
        args: list[Arg] = [
            Typed(self._emitted[id(arg)], arg.dtype) if isinstance(arg, Value) else arg for arg in value.args
        ]
        return emit(b, value.name, args, value.dtype, value.operands)

    def _get(self, b: Any, value: Value) -> Any:
        of = stored(value.dtype)
        index = {"row": self._r, "column": getattr(self, "_at", None), "element": getattr(self, "_index", None)}
        place = b.gep(self._read[id(value)], [index[value.place]], source_etype=of)
        if value.place == "row":
            found = _spread(b, b.load(place, align=value.dtype.itemsize, typ=of))
        else:
            found = b.load(place, align=value.dtype.itemsize, typ=vector(of))
        return b.trunc(found, vector(lane(value.dtype))) if value.dtype == torch.bool else found

    def _put(self, b: Any, found: Any, dtype: torch.dtype, address: Any, index: Any) -> None:
        found = b.zext(found, vector(stored(dtype))) if dtype == torch.bool else found
        b.store(found, b.gep(address, [index], source_etype=stored(dtype)), align=dtype.itemsize)

    def _place(self, b: Any, columns: Any, found: Any, dtype: torch.dtype, row: Any) -> None:
        """Write each of 16 numbers to its own column of a row."""
        found = b.zext(found, vector(stored(dtype))) if dtype == torch.bool else found
        for i in range(LANES):
            own, number = (b.extract_element(each, ir.Constant(_I32, i)) for each in (columns, found))
            place = b.gep(row, [b.zext(own, _I64)], source_etype=stored(dtype))
            b.store(number, place, align=dtype.itemsize)

    def _put_one(self, b: Any, found: Any, dtype: torch.dtype, address: Any, index: Any) -> None:
        found = b.zext(found, stored(dtype)) if dtype == torch.bool else found
        b.store(found, b.gep(address, [index], source_etype=stored(dtype)), align=dtype.itemsize)

    def _accumulate(self, b: Any, store: Store, total: Any, fresh: Any) -> Any:
        return b.select(fresh, _join(b, store, total, self._emitted[id(store.value)]), total)


def _ordered(roots: Sequence[Value]) -> list[Value]:
    """Return all values that some are computed from, and these, arguments first."""
    found: dict[int, Value] = {}
    pending = list(reversed(roots))
    while pending:
        value = pending[-1]
        missing = [arg for arg in value.args if isinstance(arg, Value) and id(arg) not in found]
        if missing and id(value) not in found:
            pending += missing
            continue
        found.setdefault(id(pending.pop()), value)
    return list(found.values())


def _source(value: Value) -> int:
    assert value.source is not None
    return value.source


def _dtype(store: Store) -> torch.dtype:
    return store.value.dtype


def _neutral(store: Store) -> Any:
    return constant(float("-inf") if store.reduce == "max" else 0, _dtype(store))


def _join(b: Any, store: Store, total: Any, more: Any) -> Any:
    if store.reduce == "max":
        return larger(b, total, more)
    return (b.fadd if _dtype(store).is_floating_point else b.add)(total, more)


def _total(b: Any, store: Store, parts: Any) -> Any:
    """Join the 16 partial results: halves, then quarters, and so on."""
    count = LANES
    while count > 1:
        count //= 2
        order = [(i + count) % LANES if i < count else i for i in range(LANES)]
        places = ir.Constant(ir.VectorType(_I32, LANES), [ir.Constant(_I32, i) for i in order])
        parts = _join(b, store, parts, b.shuffle_vector(parts, ir.Constant(parts.type, ir.Undefined), places))
    return b.extract_element(parts, ir.Constant(_I32, 0))


def _spread(b: Any, number: Any) -> Any:
    """Return a vector of 16 times the same number."""
    none = ir.Constant(vector(number.type), ir.Undefined)
    one = b.insert_element(none, number, ir.Constant(_I32, 0))
    first = ir.Constant(ir.VectorType(_I32, LANES), [ir.Constant(_I32, 0)] * LANES)
    return b.shuffle_vector(one, none, first)


def _lanes(whole: Any) -> Any:
    return ir.Constant(vector(whole), [ir.Constant(whole, i) for i in range(LANES)])
