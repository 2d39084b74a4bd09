"""Counter-based random numbers: each draw depends only on (seed, tensor, model, element)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# two odd multipliers of a 32-bit finalizer with low bias (C. Wellons, "Prospecting for hash functions", 2018)
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - (1 << 32)
_SIGN = -(1 << 31)


def keys(seed: int, tensor: str, models: int) -> Tensor:
    """Return the keys of the random draws of a tensor.

    Args:
        seed: Seed of the recipe.
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
    """The random draws of one block.

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
            shape: Shape of the block, fewer than 2**31 elements.

        Returns:
            Multiples of 2**-24, float32.
        """
        size = 1
        for extent in shape:
            size = size * extent
        first, above = self._offset.to(torch.int32), (self._offset >> 32).to(torch.int32)
        word = torch.arange(size, dtype=torch.int32, device=self._keys.device)
        word += first
        # unsigned comparison: a lower word below that of the first element has overflowed into the upper word
        high = above + ((word ^ _SIGN) < (first ^ _SIGN))
        # not in place: under vmap the keys differ between tensors, but the indices are shared
        word = word ^ self._keys[model, 0]
        word = _mix(word)
        word += self._keys[model, 1]
        word ^= high * _FIRST
        word = _mix(word)
        return (word >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24).view(shape)

    def keep(self, model: int, shape: Sequence[int], probability: Tensor) -> Tensor:
        """Return for every element of a block whether its draw keeps it.

        Args:
            model: Position of the model.
            shape: Shape of the block, fewer than 2**31 elements.
            probability: 0-d, or in the shape of the block; 1 keeps all, 0 none.

        Returns:
            Where the draw is below the probability, bool.
        """
        # draws are multiples of 2**-24: rounding the probability up to such a multiple changes no comparison
        return self.uniform(model, shape) < (probability * 2.0**24).ceil() * 2.0**-24


def _mix(word: Tensor) -> Tensor:
    """Scramble int32 words in place, bijectively."""
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    word *= _FIRST
    word ^= (word >> 15).bitwise_and_(0x1FFFF)
    word *= _SECOND
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    return word
