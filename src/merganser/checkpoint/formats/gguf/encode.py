"""Values as they are stored in a GGUF file: what a converter does to them, done again, and rounded to a type.

Types with blocks of 32 values are rounded by the `gguf` package, which llama.cpp's authors publish; those of 256 by us, as it
cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...dtypes import DType
from .header import TYPE_BY_NAME, GgufType
from .k_quants import K_TYPES, quantise_k
from .values import PLAIN

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WRITABLE", "GgufEncoding"]

_LARGEST = 65504.0
_STEPS = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 1, "Q5_0": 16, "Q5_1": 1}
_STEPS |= {"Q2_K": 14, "Q3_K": 100, "Q4_K": 60, "Q5_K": 60, "Q6_K": 3500}
"""How many times the largest float16 the values of a type may be, for its scales are float16; of K types, whose scales are
fitted, somewhat less."""

WRITABLE: dict[str, GgufType] = {name: TYPE_BY_NAME[name] for name in ("F32", "F16", "BF16", *_STEPS)}
"""Types of tensors that can be written, by name."""


@dataclass(frozen=True, slots=True)
class GgufEncoding:
    """How a tensor is stored.

    Args:
        type: The type.
        columns: Values of a row; of a vector, 1, as it may be cut anywhere.
        head: Rows of a head, or elements of a bias, whose order is changed for the way in which llama.cpp rotates
            positions; 0 if the order is kept.
        plus_one: Whether one is added to the values.
    """

    type: GgufType
    columns: int
    head: int = 0
    plus_one: bool = False

    @property
    def step(self) -> int:
        """Number of elements that must be encoded together, or a multiple of it."""
        return self.columns * max(self.head, 1)

    @property
    def plain(self) -> DType | None:
        """The dtype to which the merged value is rounded and then stored unchanged; None if more is done to it."""
        return None if self.plus_one else PLAIN.get(self.type.name)

    @property
    def largest(self) -> float | None:
        """The largest magnitude that the scales allow; None if there are no scales."""
        steps = _STEPS.get(self.type.name)
        return None if steps is None else steps * _LARGEST

    def nbytes(self, elements: int) -> int:
        """Return the bytes of a number of elements that is a multiple of the type's blocks."""
        return elements // self.type.values * self.type.nbytes

    def encode(self, values: Tensor) -> Tensor:
        """Return the bytes of consecutive elements, flat.

        Args:
            values: A multiple of `step` elements, flat; in the dtype `plain` if that is not None.
        """
        import torch

        if self.plus_one:
            values = values + 1
        if self.head:
            values = values.view(-1, 2, self.head // 2, self.columns).transpose(1, 2).reshape(-1)
        dtype = PLAIN.get(self.type.name)
        if dtype is not None:
            return values.to(getattr(torch, dtype.name)).contiguous().view(torch.uint8)
        rows = values.float().view(-1, self.columns).numpy()
        if self.type.name in K_TYPES:
            return torch.from_numpy(quantise_k(rows, self.type.name))
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        return torch.from_numpy(quantize(rows, GGMLQuantizationType[self.type.name])).view(-1)

    def decode(self, data: Tensor) -> Tensor:
        """Return the values that the bytes of a whole tensor stand for, flat, float32."""
        import torch

        dtype = PLAIN.get(self.type.name)
        if dtype is not None:
            values = data.view(getattr(torch, dtype.name)).float()
        else:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize

            rows = data.view(-1, self.nbytes(self.columns)).numpy()
            values = torch.from_numpy(dequantize(rows, GGMLQuantizationType[self.type.name])).view(-1)
        if self.head:
            values = values.view(-1, self.head // 2, 2, self.columns).transpose(1, 2).reshape(-1)
        return values - 1 if self.plus_one else values
