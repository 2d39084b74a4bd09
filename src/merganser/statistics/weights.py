"""Recognise the weights that statistics were computed with, without reading all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

__all__ = ["weights_sample"]

_BYTES = 4096


def weights_sample(checkpoint: Checkpoint) -> str:
    """Return a hash of the names, dtypes and shapes of all tensors, and of some bytes in the middle of each.

    Two fine-tunes of one base have different samples, unless they differ in single entries only.

    Raises:
        CheckpointError: A file cannot be read.
    """
    digest = xxhash.xxh3_128()
    with checkpoint.reader() as reader:
        for name, tensor in sorted(checkpoint.tensors.items()):
            digest.update(f"{name} {tensor.dtype.name} {tensor.shape}".encode())
            size = min(_BYTES, tensor.nbytes)
            # even offsets, so that no element is cut
            start = (tensor.nbytes - size) // 2 // 16 * 16
            buffer = bytearray(size)
            reader.read_into(tensor, start, memoryview(buffer))
            digest.update(buffer)
    return digest.hexdigest()
