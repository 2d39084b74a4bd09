"""The values of GGUF's types, and what converters did to them, undone.

The arithmetic of the types is that of the `gguf` package, which llama.cpp's authors publish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....errors import UnsupportedError
from ...derived.derived import Rows, read_columns, read_rows
from ...dtypes import DTYPE_BY_NAME
from ...tensor import ByteReader, Noise, TensorInfo
from ..quantised.bits import E2M1
from ..quantised.noise import CodeNoise, StepNoise
from .header import TYPE_BY_NAME

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PLAIN",
    "Dequantised",
    "LogOfNegative",
    "MinusOne",
    "Part",
    "Permuted",
    "Plain",
    "Stored",
    "noise_of",
    "require_gguf",
]

PLAIN = {
    "F32": DTYPE_BY_NAME["float32"],
    "F16": DTYPE_BY_NAME["float16"],
    "BF16": DTYPE_BY_NAME["bfloat16"],
    "F64": DTYPE_BY_NAME["float64"],
    "I8": DTYPE_BY_NAME["int8"],
    "I16": DTYPE_BY_NAME["int16"],
    "I32": DTYPE_BY_NAME["int32"],
    "I64": DTYPE_BY_NAME["int64"],
}
"""Types whose values are stored as they are."""

_IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_NOISE: dict[str, Noise] = {
    "Q4_0": StepNoise(32, 16, symmetric=True),
    "Q4_1": StepNoise(32, 15, symmetric=False),
    "Q5_0": StepNoise(32, 32, symmetric=True),
    "Q5_1": StepNoise(32, 31, symmetric=False),
    "Q8_0": StepNoise(32, 254, symmetric=True),
    "Q2_K": StepNoise(16, 3, symmetric=False),
    "Q3_K": StepNoise(16, 8, symmetric=True),
    "Q4_K": StepNoise(32, 15, symmetric=False),
    "Q5_K": StepNoise(32, 31, symmetric=False),
    "Q6_K": StepNoise(16, 64, symmetric=True),
    "IQ4_NL": CodeNoise(32, _IQ4),
    "IQ4_XS": CodeNoise(32, _IQ4),
    "TQ1_0": StepNoise(256, 2, symmetric=True),
    "TQ2_0": StepNoise(256, 2, symmetric=True),
    "MXFP4": CodeNoise(32, tuple(sorted(set(E2M1)))),
    "NVFP4": CodeNoise(16, tuple(sorted(set(E2M1)))),
    # lattices: as many steps as their bits per value allow
    "IQ3_S": StepNoise(32, 10, symmetric=True),
    "IQ3_XXS": StepNoise(32, 8, symmetric=True),
    "IQ2_S": StepNoise(32, 5, symmetric=True),
    "IQ2_XS": StepNoise(32, 4, symmetric=True),
    "IQ2_XXS": StepNoise(32, 4, symmetric=True),
    "IQ1_S": StepNoise(32, 2, symmetric=True),
    "IQ1_M": StepNoise(32, 2, symmetric=True),
}
UNREADABLE = ("Q8_1", "Q8_K", "Q1_0")
"""Types of activations, and those that the package cannot dequantise."""


def noise_of(kind: str) -> Noise | None:
    """Return the noise of a type; None if it does not round."""
    return _NOISE.get(kind)


def require_gguf(where: str) -> None:
    """Raise UnsupportedError if the package that dequantises is not installed."""
    try:
        import gguf.quants  # noqa: F401
    except ImportError:
        raise UnsupportedError(f"{where}: quantised GGUF files need: pip install 'merganser[gguf]'") from None


@dataclass(frozen=True, slots=True)
class Dequantised:
    """Rows of blocks.

    Args:
        stored: The bytes, uint8 [rows, bytes per row].
        type: The type's name.
    """

    stored: TensorInfo
    type: str

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows as float32."""
        return self._values(read_rows(reader, self.stored, first, end))

    def part(self, reader: ByteReader, rows: range, columns: range) -> Tensor:
        """Return some columns of some rows as float32; only the blocks that hold them are read."""
        kind = TYPE_BY_NAME[self.type]
        low, high = columns.start // kind.values, -(-columns.stop // kind.values)
        data = read_columns(reader, self.stored, rows, range(low * kind.nbytes, high * kind.nbytes))
        return self._values(data)[:, columns.start - low * kind.values :][:, : len(columns)]

    def _values(self, data: Tensor) -> Tensor:
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[self.type]))


@dataclass(frozen=True, slots=True)
class Plain:
    """Rows that are stored as they are."""

    stored: TensorInfo

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows as float32."""
        return read_rows(reader, self.stored, first, end).float()

    def part(self, reader: ByteReader, rows: range, columns: range) -> Tensor:
        """Return some columns of some rows as float32."""
        return read_columns(reader, self.stored, rows, columns).float()


Stored = Dequantised | Plain


@dataclass(frozen=True, slots=True)
class LogOfNegative:
    """The logarithms of values that are stored negative and exponentiated, as Mamba's A."""

    stored: Rows

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows as float32."""
        # in float64: in float32, the last bit of a logarithm depends on where a piece begins
        return (-self.stored(reader, first, end)).double().log().float()


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a larger tensor: one expert of a stack."""

    whole: Rows
    start: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows as float32."""
        return self.whole(reader, self.start + first, self.start + end)


@dataclass(frozen=True, slots=True)
class MinusOne:
    """Weights of norms to which the converter added one."""

    stored: Rows

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows as float32."""
        return self.stored(reader, first, end) - 1


@dataclass(frozen=True, slots=True)
class Permuted:
    """Projections of queries or keys whose rows were reordered for another way of rotating positions.

    The file has the pairs that are rotated together one after the other; the model has all first halves of a head
    before all second halves.

    Args:
        stored: The rows in the file's order.
        size: Rows of a head.
        flat: Whether it is a bias: one row, whose elements are reordered.
    """

    stored: Rows
    size: int
    flat: bool

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        """Return rows as float32."""
        import torch

        if self.flat:
            values = self.stored(reader, first, end)
            return values.view(-1, self.size // 2, 2).mT.reshape(values.shape)
        rows = torch.arange(first, end)
        within = rows % self.size
        half = self.size // 2
        places = rows - within + within % half * 2 + within // half
        low = int(places.min())
        return self.stored(reader, low, int(places.max()) + 1)[places - low]
