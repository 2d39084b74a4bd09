"""Experts with noise on them, which is drawn while they are read."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import DTYPE_BY_NAME, TensorInfo, derive
from ..checkpoint.derived.derived import read_rows
from ..checkpoint.tensor import ByteReader

__all__ = ["noisy"]


def noisy(tensor: TensorInfo, name: str, scale: float, seed: int) -> TensorInfo:
    """Return a matrix with normal noise added, the same on every machine and in blocks of any size.

    Args:
        tensor: The matrix.
        name: Name of the result, which decides the noise together with the seed.
        scale: Standard deviation of the noise.
        seed: Seed of the recipe.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0noise\0{name}".encode(), digest_size=16).digest(), "little")
    dtype = DTYPE_BY_NAME["float64" if tensor.dtype.name == "float64" else "float32"]
    natural = tensor.natural or tensor.dtype
    return derive(name, tensor.shape, [tensor], _Noisy(tensor, scale, key), natural=natural, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Noisy:
    """Rows with noise; every row has random numbers of its own."""

    tensor: TensorInfo
    scale: float
    key: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        values = read_rows(reader, self.tensor, first, end)
        wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
        width = math.prod(self.tensor.shape[-1:])
        for row in range(first, end):
            draw = np.random.Generator(np.random.Philox(key=self.key, counter=row << 64))
            wide[row - first] += self.scale * torch.from_numpy(draw.standard_normal(width)).to(wide.dtype)
        return wide
