"""What a kernel is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..fusion.trace import Form
from .data import Data


@dataclass(frozen=True, slots=True)
class Block:
    """What a kernel is called with.

    Args:
        base: The block of the base, if the method takes one, in its dtype in the file.
        models: The blocks of the other inputs.
        rows: Solved statistics of the block's rows, shape [rows, ...].
        numbers: Numeric parameters.
        known: Other solved statistics.
        keys: Keys of random draws, from `ops.random.keys`.
        offset: Index of the block's first element in the tensor.
        data: Statistics from data, a tensor per model; kernels that take them are never fused.
    """

    base: Tensor | None
    models: Sequence[Tensor]
    rows: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor]
    known: Mapping[str, Tensor]
    keys: Tensor
    offset: int
    data: Data = field(default_factory=dict)

    def fixed(self) -> list[Tensor]:
        """Return the tensors that are the same for all blocks of a tensor, in a fixed order."""
        return [*self.numbers.values(), *self.known.values(), self.keys]

    def forms(self) -> tuple[Form, ...]:
        """Return the forms of all inputs of a kernel: those of the block, then the fixed ones."""
        return (
            *(Form("block", x.dtype) for x in self.inputs()),
            *(Form("rows", x.dtype, tuple(x.shape[1:])) for x in self.rows.values()),
            Form("scalar", torch.int64),
            *(Form("fixed", x.dtype, tuple(x.shape)) for x in self.fixed()),
        )

    def inputs(self) -> list[Tensor]:
        """Return the blocks of all inputs, the base first."""
        return [*self.models] if self.base is None else [self.base, *self.models]


def arguments(block: Block) -> tuple[Any, ...]:
    """Return the arguments of a kernel function for a block."""
    known = (dict(block.rows), dict(block.numbers), dict(block.known))
    offset: Any = block.offset
    if not isinstance(offset, Tensor):
        offset = torch.tensor(offset, dtype=torch.int64, device=block.keys.device)
    return block.base, list(block.models), *known, block.keys, offset, dict(block.data)


def rebuild(like: Block, tensors: Sequence[Tensor]) -> Block:
    """Return a block made of tensors in the order of `Block.forms`."""
    left = iter(tensors)
    base = None if like.base is None else next(left)
    models = [next(left) for _ in like.models]
    rows = {name: next(left) for name in like.rows}
    offset: Any = next(left)
    numbers, known = ({name: next(left) for name in own} for own in (like.numbers, like.known))
    return Block(base, models, rows, numbers, known, next(left), offset)
