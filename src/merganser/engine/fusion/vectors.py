"""Vectors of 16 numbers in LLVM: their types, constants, and conversions as torch does them.

bfloat16 is an integer of 16 bits here, as few processors compute with it; it is converted by integer arithmetic, since the
instructions that some have for that set subnormal numbers to 0.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
import torch

LANES = 16

_TYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: ir.IntType(16),
    torch.float16: ir.HalfType(),
    torch.float32: ir.FloatType(),
    torch.float64: ir.DoubleType(),
    torch.int16: ir.IntType(16),
    torch.int32: ir.IntType(32),
    torch.int64: ir.IntType(64),
    torch.bool: ir.IntType(1),
}
FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int16, torch.int32, torch.int64)
# NaN as torch rounds it to bfloat16
_NAN = 0xFFFF


def lane(dtype: torch.dtype) -> Any:
    """Return the type of one number in a register."""
    return _TYPES[dtype]


def stored(dtype: torch.dtype) -> Any:
    """Return the type of one number in memory: a bool takes a byte."""
    return ir.IntType(8) if dtype == torch.bool else _TYPES[dtype]


def vector(of: Any) -> Any:
    """Return the type of a vector of numbers of a type."""
    return ir.VectorType(of, LANES)


def splat(of: Any, number: Any) -> Any:
    """Return a vector of 16 times the same number."""
    if isinstance(of, (ir.FloatType, ir.HalfType)):
        # what is too large for float32 is infinite there
        with np.errstate(over="ignore"):
            number = float(np.float32(number))
    elif isinstance(of, ir.DoubleType):
        number = float(number)
    else:
        # as two's complement
        number = int(number) & ((1 << of.width) - 1)
    return ir.Constant(vector(of), [ir.Constant(of, number)] * LANES)


def constant(number: Any, dtype: torch.dtype) -> Any:
    """Return a Python number as a vector of a dtype."""
    if dtype == torch.bool:
        return splat(lane(dtype), bool(number))
    if dtype in (torch.bfloat16, torch.float16):
        held = torch.tensor(number, dtype=dtype)
        return splat(lane(dtype), held.view(torch.int16).item() if dtype == torch.bfloat16 else held.item())
    return splat(lane(dtype), number)


def converts(source: torch.dtype, to: torch.dtype) -> bool:
    """Return whether `convert` knows a conversion: all but those of floats to integers, undefined outside their range."""
    if source not in _TYPES or to not in _TYPES:
        return False
    return not (source.is_floating_point and to in INTEGERS)


def convert(builder: Any, value: Any, source: torch.dtype, to: torch.dtype) -> Any:
    """Convert a vector as torch converts a tensor."""
    if source == to:
        return value
    if to == torch.bool:
        zero = constant(0, source)
        if source in (torch.bfloat16, torch.float16):
            value, zero = convert(builder, value, source, torch.float32), constant(0, torch.float32)
            source = torch.float32
        floats = source.is_floating_point
        return builder.fcmp_unordered("!=", value, zero) if floats else builder.icmp_signed("!=", value, zero)
    if source.is_floating_point:
        return _from_float(builder, value, source, to)
    if to.is_floating_point:
        # 16-bit floats are rounded from float32, as in torch
        wide = to if to in FLOATS else torch.float32
        into = builder.uitofp if source == torch.bool else builder.sitofp
        return convert(builder, into(value, vector(lane(wide))), wide, to)
    if source == torch.bool:
        return builder.zext(value, vector(lane(to)))
    narrows = lane(source).width > lane(to).width
    return (builder.trunc if narrows else builder.sext)(value, vector(lane(to)))


def _from_float(builder: Any, value: Any, source: torch.dtype, to: torch.dtype) -> Any:
    """Convert floats to floats; all conversions that are not between float32 and another dtype go by way of float32."""
    single, double = vector(lane(torch.float32)), vector(lane(torch.float64))
    if source == torch.bfloat16:
        high = builder.shl(builder.zext(value, vector(ir.IntType(32))), splat(ir.IntType(32), 16))
        value = builder.bitcast(high, single)
    elif source == torch.float16:
        value = builder.fpext(value, single)
    elif source == torch.float64:
        value = builder.fptrunc(value, single)
    if to == torch.float64:
        return builder.fpext(value, double)
    if to == torch.float16:
        return builder.fptrunc(value, vector(lane(to)))
    return _to_bfloat16(builder, value) if to == torch.bfloat16 else value


def _to_bfloat16(builder: Any, value: Any) -> Any:
    """Round float32 to the nearest bfloat16, halfway cases to the even one."""
    whole = ir.IntType(32)
    bits = builder.bitcast(value, vector(whole))
    odd = builder.and_(builder.lshr(bits, splat(whole, 16)), splat(whole, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, splat(whole, 0x7FFF))), splat(whole, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, splat(whole, _NAN), rounded), vector(ir.IntType(16)))
