"""Counter-based randomness: a draw depends on (seed, tensor, model, element) and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# two odd multipliers of a 32-bit finalizer with low bias (C. Wellons, "Prospecting for hash functions", 2018)
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - (1 << 32)


def keys(seed: int, tensor: str, models: int) -> Tensor:
    """Return the keys of a tensor's draws.

    Args:
        seed: The recipe's seed.
        tensor: Name of the output tensor.
        models: Number of models.

    Returns:
        Shape [models, 2], int32.
    """
    rows = []
    for position in range(models):
        digest = hashlib.blake2b(f"{seed}\0{tensor}\0{position}".encode(), digest_size=8).digest()
        rows.append([int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)])
    return torch.tensor(rows, dtype=torch.int32).view(models, 2)


class Random:
    """The draws of one block.

    Args:
        keys: Shape [models, 2], int32, from `keys`.
        offset: Index of the block's first element in its tensor, 0-d, int64.
    """

    def __init__(self, keys: Tensor, offset: Tensor) -> None:
        self._keys = keys
        self._offset = offset

    def uniform(self, model: int, shape: Sequence[int]) -> Tensor:
        """Draw uniformly from [0, 1) for every element of a block.

        Args:
            model: Position of the model.
            shape: Shape of the block.

        Returns:
            Multiples of 2**-24, float32.
        """
        size = 1
        for extent in shape:
            size = size * extent
        index = torch.arange(size, dtype=torch.int64, device=self._keys.device) + self._offset
        low, high = index.to(torch.int32), (index >> 32).to(torch.int32)
        word = _mix(low ^ self._keys[model, 0])
        word = _mix((word + self._keys[model, 1]) ^ (high * _FIRST))
        return (((word >> 8) & 0xFFFFFF).float() * 2.0**-24).view(shape)


def _mix(word: Tensor) -> Tensor:
    """Scramble int32 words, bijectively."""
    word = (word ^ ((word >> 16) & 0xFFFF)) * _FIRST
    word = (word ^ ((word >> 15) & 0x1FFFF)) * _SECOND
    return word ^ ((word >> 16) & 0xFFFF)
