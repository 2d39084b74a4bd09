"""Element types as safetensors names them, and how merganser treats each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DTYPES", "DTYPE_BY_NAME", "DType", "Kind"]

Kind = Literal["float", "int", "bool", "quantised"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        tag: the name in a safetensors header, such as `"BF16"`.
        name: the name in torch, such as `"bfloat16"`.
        bits: the size of one element in bits; below 8 for packed types.
        kind: `"float"` can be merged; `"int"` and `"bool"` are copied if equal; `"quantised"` values have no meaning
            without their scales.
    """

    tag: str
    name: str
    bits: int
    kind: Kind

    @property
    def itemsize(self) -> int:
        """The size of one element in bytes; 1 for types smaller than a byte."""
        return max(1, self.bits // 8)

    def nbytes(self, numel: int) -> int:
        """Return the bytes that `numel` elements take, rounded up."""
        return (numel * self.bits + 7) // 8


_ALL = (
    DType("F64", "float64", 64, "float"),
    DType("F32", "float32", 32, "float"),
    DType("F16", "float16", 16, "float"),
    DType("BF16", "bfloat16", 16, "float"),
    DType("I64", "int64", 64, "int"),
    DType("I32", "int32", 32, "int"),
    DType("I16", "int16", 16, "int"),
    DType("I8", "int8", 8, "int"),
    DType("U64", "uint64", 64, "int"),
    DType("U32", "uint32", 32, "int"),
    DType("U16", "uint16", 16, "int"),
    DType("U8", "uint8", 8, "int"),
    DType("BOOL", "bool", 8, "bool"),
    DType("F8_E4M3", "float8_e4m3fn", 8, "quantised"),
    DType("F8_E5M2", "float8_e5m2", 8, "quantised"),
    DType("F8_E8M0", "float8_e8m0fnu", 8, "quantised"),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, "quantised"),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, "quantised"),
    DType("F6_E2M3", "float6_e2m3fn", 6, "quantised"),
    DType("F6_E3M2", "float6_e3m2fn", 6, "quantised"),
    DType("F4", "float4_e2m1fn_x2", 4, "quantised"),
)

DTYPES: dict[str, DType] = {dtype.tag: dtype for dtype in _ALL}
"""Element types by their safetensors tag."""

DTYPE_BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}
"""Element types by their torch name."""
