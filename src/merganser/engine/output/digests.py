"""Hashes of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import xxhash

from ..kernels.blocks import block_step

DIGEST = 16
"""Length of a digest, bytes."""


Digests = Mapping[tuple[Path, ...], Mapping[str, bytes]]
"""The digest of every input tensor that was read, by `TensorInfo.place`: its files, then its name."""

digest = xxhash.xxh3_128_digest
"""Returns the xxh3-128 digest of bytes."""


def tensor_digest(pieces: Sequence[bytes]) -> bytes:
    """Return the digest of a tensor: of the digests of its pieces."""
    return digest(pieces[0] if len(pieces) == 1 else b"".join(pieces))


def block_digests(shape: Sequence[int], start: int, end: int, data: memoryview, block: int) -> list[bytes]:
    """Hash elements of an input, cut wherever a block of any method may begin, so that no hash depends on the method.

    Args:
        shape: Shape of the tensor.
        start: Index of the first element.
        end: Index after the last element.
        data: The bytes of these elements.
        block: Most elements per block, as in the plan.
    """
    return cut_digests(digest_cuts(shape, start, end, block), data)


def cut_digests(cuts: Sequence[int], data: memoryview) -> list[bytes]:
    """Hash each piece of data between consecutive cuts, which are element indices."""
    if len(cuts) <= 2:
        return [digest(data)]
    start = cuts[0]
    size = data.nbytes // (cuts[-1] - start)
    return [digest(data[(a - start) * size : (b - start) * size]) for a, b in pairwise(cuts)]


def digest_cuts(shape: Sequence[int], start: int, end: int, block: int) -> list[int]:
    """Return the element indices at which `block_digests` cuts, including `start` and `end`."""
    if start == end:
        return [start]
    steps = {block_step(shape, scope, block) for scope in ("element", "row")}
    if len(shape) == 3:
        # a stack of matrices may be merged as the rows of all matrices, or matrix by matrix
        steps |= {block_step((shape[0] * shape[1], shape[2]), "row", block), block_step(shape, "matrix", block)}
    cuts = {start}
    for step in steps:
        cuts.update(range(-(-start // step) * step, end, step))
    return [*sorted(cuts), end]
