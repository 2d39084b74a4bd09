"""Which instructions compute an elementwise operation of torch.

Every function here gives the bits that torch gives: without fused multiply-add, with NaN, infinities, -0.0 and subnormal
numbers as they are. An operation that cannot do that (a logarithm, or a square root, which torch takes from a library that
does not round every one correctly) is left out, and runs in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
import torch

from .graph import Node
from .vectors import FLOATS, INTEGERS, constant, convert, converts, lane, vector

_NUMBERS = (*FLOATS, torch.int32, torch.int64)
_WHOLE = (*INTEGERS, torch.bool)
_ANY = (*_NUMBERS, torch.int16, torch.bool)


@dataclass(frozen=True, slots=True)
class Typed:
    """A vector and the dtype of its numbers."""

    value: Any
    dtype: torch.dtype


_HARMLESS = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")

Arg = Typed | int | float | None
_Emit = Callable[[Any, Sequence[Any]], Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """How an operation is computed.

    Args:
        emit: Gets LLVM's builder, and the operands as vectors of one dtype; returns the vector of the result.
        dtypes: Dtypes of operands for which it gives what torch gives.
        meet: Which dtype operands are converted to: "operands", that in which two of them meet; "result"; or "own".
    """

    emit: _Emit
    dtypes: tuple[torch.dtype, ...] = _NUMBERS
    meet: str = "operands"


def computes(node: Node, dtypes: Sequence[torch.dtype | None]) -> bool:
    """Return whether an elementwise operation can be part of a loop.

    Args:
        node: The operation; its name is in `ELEMENTWISE`.
        dtypes: Dtypes of its arguments; None for Python numbers.
    """
    named = {key: value for key, value in (node.kwargs or {}).items() if key not in _HARMLESS}
    if named.pop("alpha", 1) != 1 or any(value is not None for value in named.values()):
        return False
    operation, rest, dtype = ELEMENTWISE[node.name], node.args[1:], node.dtype
    assert dtype is not None
    if node.name.split(".")[1] in ("add", "sub", "rsub") and rest[1:] not in ((), (1,)):
        return False  # alpha, by position
    if "clamp" in node.name and any(isinstance(one, float) and math.isnan(one) for one in rest):
        return False
    if node.name == "aten.where.self":
        return dtypes[0] == torch.bool and all(one is None or converts(one, dtype) for one in dtypes[1:])
    if node.name == "aten._to_copy.default":
        return dtypes[0] is not None and converts(dtypes[0], dtype)
    if node.name == "aten.view.dtype":
        return dtypes[0] is not None and dtypes[0].itemsize == dtype.itemsize and torch.bool not in (dtypes[0], dtype)
    if node.name == "aten.pow.Tensor_Scalar" and rest != (2,):
        return False
    if "shift" in node.name and not (isinstance(rest[0], int) and 0 <= rest[0] < 8 * dtype.itemsize):
        return False
    met = dtype if operation.meet == "result" or node.operands is None else node.operands
    return met in operation.dtypes and all(one is None or converts(one, met) for one in dtypes)


def emit(builder: Any, name: str, args: Sequence[Arg], dtype: torch.dtype, operands: torch.dtype | None) -> Any:
    """Emit the instructions of an operation.

    Args:
        builder: LLVM's builder, at the end of a block.
        name: Name of the operation.
        args: Its operands.
        dtype: Dtype of the result.
        operands: Dtype in which the operands meet, if there are two.

    Returns:
        A vector of `dtype`.
    """
    operation = ELEMENTWISE[name]
    if operation.meet == "own":
        return operation.emit(builder, [*args, dtype])
    met = dtype if operation.meet == "result" or operands is None else operands
    values = [None if arg is None else _as(builder, arg, met) for arg in args]
    return operation.emit(builder, values)


def _as(builder: Any, arg: Arg, dtype: torch.dtype) -> Any:
    if isinstance(arg, Typed):
        return convert(builder, arg.value, arg.dtype, dtype)
    return constant(arg, dtype)


def intrinsic(builder: Any, name: str, args: Sequence[Any]) -> Any:
    """Call an intrinsic function of LLVM on vectors of one type."""
    of = args[0].type
    short = {ir.FloatType(): "f32", ir.DoubleType(): "f64"}[of.element]
    full = f"llvm.{name}.v{of.count}{short}"
    known = builder.module.globals.get(full)
    function = known or ir.Function(builder.module, ir.FunctionType(of, [of] * len(args)), full)
    return builder.call(function, args)


def is_float(value: Any) -> bool:
    """Return whether a vector holds floats."""
    return isinstance(value.type.element, (ir.FloatType, ir.DoubleType))


def larger(builder: Any, a: Any, b: Any) -> Any:
    """Return the larger of two vectors of floats, NaN if one is; of 0.0 and -0.0 the second, as in torch's vectors."""
    first = builder.or_(builder.fcmp_ordered(">", a, b), builder.fcmp_unordered("uno", a, a))
    return builder.select(first, a, b)


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    first = builder.or_(builder.fcmp_ordered("<", a, b), builder.fcmp_unordered("uno", a, a))
    return builder.select(first, a, b)


def _either(floats: str, integers: str) -> _Emit:
    """Return the instruction for floats or that for integers."""

    def emit(builder: Any, args: Sequence[Any]) -> Any:
        return getattr(builder, floats if is_float(args[0]) else integers)(args[0], args[1])

    return emit


def _compare(sign: str) -> _Emit:
    def emit(builder: Any, args: Sequence[Any]) -> Any:
        a, b = args
        if not is_float(a):
            return (builder.icmp_unsigned if a.type.element.width == 1 else builder.icmp_signed)(sign, a, b)
        return builder.fcmp_unordered(sign, a, b) if sign == "!=" else builder.fcmp_ordered(sign, a, b)

    return emit


def _absolute(builder: Any, args: Sequence[Any]) -> Any:
    return intrinsic(builder, "fabs", args)


def _clamp(builder: Any, args: Sequence[Any]) -> Any:
    value, low, high = [*args, None][:3]
    if low is not None:
        value = builder.select(builder.fcmp_ordered("<", value, low), low, value)
    if high is not None:
        value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
    return value


def _clamp_to_tensors(builder: Any, args: Sequence[Any]) -> Any:
    value, low, high = [*args, None][:3]
    if low is not None:
        value = larger(builder, value, low)
    return value if high is None else _smaller(builder, value, high)


def _where(builder: Any, args: Sequence[Any]) -> Any:
    mask, first, second, dtype = args
    return builder.select(mask.value, _as(builder, first, dtype), _as(builder, second, dtype))


def _copy(builder: Any, args: Sequence[Any]) -> Any:
    return _as(builder, args[0], args[-1])


def _reinterpret(builder: Any, args: Sequence[Any]) -> Any:
    return builder.bitcast(args[0].value, vector(lane(args[-1])))


def _shift(builder: Any, args: Sequence[Any]) -> Any:
    return builder.ashr(args[0], args[1])


def _reciprocal(builder: Any, args: Sequence[Any]) -> Any:
    one = ir.Constant(args[0].type, [ir.Constant(args[0].type.element, 1.0)] * args[0].type.count)
    return builder.fdiv(one, args[0])


_ADD, _SUB, _MUL = _either("fadd", "add"), _either("fsub", "sub"), _either("fmul", "mul")

ELEMENTWISE: Mapping[str, Operation] = {
    **{f"aten.add.{kind}": Operation(_ADD) for kind in ("Tensor", "Scalar")},
    **{f"aten.sub.{kind}": Operation(_SUB) for kind in ("Tensor", "Scalar")},
    **{f"aten.mul.{kind}": Operation(_MUL) for kind in ("Tensor", "Scalar")},
    **{
        f"aten.div.{kind}": Operation(lambda b, x: b.fdiv(x[0], x[1]), FLOATS, "result")
        for kind in ("Tensor", "Scalar")
    },
    "aten.rsub.Scalar": Operation(lambda b, x: _SUB(b, [x[1], x[0]])),
    "aten.neg.default": Operation(lambda b, x: b.fneg(x[0]), FLOATS, "result"),
    "aten.abs.default": Operation(_absolute, FLOATS, "result"),
    "aten.ceil.default": Operation(lambda b, x: intrinsic(b, "ceil", x), FLOATS, "result"),
    "aten.floor.default": Operation(lambda b, x: intrinsic(b, "floor", x), FLOATS, "result"),
    "aten.reciprocal.default": Operation(_reciprocal, FLOATS, "result"),
    "aten.pow.Tensor_Scalar": Operation(lambda b, x: b.fmul(x[0], x[0]), FLOATS, "result"),
    "aten.maximum.default": Operation(lambda b, x: larger(b, x[0], x[1]), FLOATS, "result"),
    "aten.minimum.default": Operation(lambda b, x: _smaller(b, x[0], x[1]), FLOATS, "result"),
    "aten.clamp.default": Operation(_clamp, FLOATS, "result"),
    "aten.clamp_min.default": Operation(_clamp, FLOATS, "result"),
    "aten.clamp.Tensor": Operation(_clamp_to_tensors, FLOATS, "result"),
    **{
        f"aten.bitwise_{name}.{kind}": Operation(
            lambda b, x, word=word: getattr(b, word)(x[0], x[1]),  # type: ignore[misc]
            _WHOLE,
            "result",
        )
        for name, word in (("and", "and_"), ("or", "or_"), ("xor", "xor"))
        for kind in ("Tensor", "Scalar")
    },
    "aten.bitwise_not.default": Operation(lambda b, x: b.not_(x[0]), _WHOLE, "result"),
    "aten.__rshift__.Scalar": Operation(_shift, (torch.int32, torch.int64), "result"),
    **{
        f"aten.{name}.{kind}": Operation(_compare(sign), _ANY)
        for name, sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))
        for kind in ("Tensor", "Scalar")
    },
    "aten.where.self": Operation(_where, meet="own"),
    "aten._to_copy.default": Operation(_copy, meet="own"),
    "aten.view.dtype": Operation(_reinterpret, meet="own"),
}
"""The operations that loops know, by their names in torch."""
