"""Functions made into programs, and run on blocks beside torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merganser.engine.fusion.run import Program
from merganser.engine.fusion.trace import Form


def fuse(
    function: Callable[..., Sequence[Tensor]],
    blocks: Sequence[Tensor],
    fixed: Sequence[Tensor] = (),
    rows: Sequence[Tensor] = (),
    *,
    by_row: bool = False,
) -> Program:
    """A program for functions of blocks, then rows, then fixed tensors."""
    forms = [Form("block", block.dtype) for block in blocks]
    forms += [Form("rows", own.dtype, tuple(own.shape[1:])) for own in rows]
    forms += [Form("fixed", own.dtype, tuple(own.shape)) for own in fixed]
    return Program(function, forms, blocks[0].shape[1] if by_row else None)


def run(
    function: Callable[..., Sequence[Tensor]],
    blocks: Sequence[Tensor],
    fixed: Sequence[Tensor] = (),
    rows: Sequence[Tensor] = (),
    *,
    by_row: bool = False,
) -> list[Tensor]:
    """What the program gives."""
    return fuse(function, blocks, fixed, rows, by_row=by_row).bind(fixed)([*blocks, *rows])


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether dtypes, shapes and bits are equal; any NaN equals any other."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    if found.is_floating_point():
        nan = found.isnan()
        if not torch.equal(nan, expected.isnan()):
            return False
        found, expected = found.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    return torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def patterns(dtype: torch.dtype, size: int, seed: int) -> Tensor:
    """Numbers of all kinds: ordinary ones, random bits, and the special ones between them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(size, generator=generator) < 0.5
    if not dtype.is_floating_point:
        bound = torch.iinfo(dtype)
        return torch.randint(bound.min, bound.max, (size,), generator=generator, dtype=dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    found = torch.finfo(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, found.max, -found.max, found.tiny]
    special += [found.smallest_normal / 3, -found.smallest_normal / 5, 2.0**-24 + 2.0**-40]
    ordinary = torch.randn(size // 2, generator=generator).to(dtype)
    random = patterns(whole, size - size // 2 - len(special), seed + 1).view(dtype)
    return torch.cat([torch.tensor(special, dtype=dtype), ordinary, random])
