"""The position of every byte of a checkpoint to be written, computed before the first byte is written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .dtypes import DType

__all__ = ["INDEX_NAME", "Shard", "index_json", "plan_shards"]

INDEX_NAME = "model.safetensors.index.json"
"""The file that maps tensors to shards; written only if there is more than one shard."""

_ALIGNMENT = 8

_Tensor = tuple[str, DType, tuple[int, ...]]
_Sized = tuple[str, DType, tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file to be written.

    Attributes:
        name: the file's name.
        header: its first bytes, complete: the length and the JSON, padded to a multiple of 8.
        entries: for each tensor, in file order, its first byte in the file and its size in bytes.
        size: the size of the whole file in bytes.
    """

    name: str
    header: bytes
    entries: dict[str, tuple[int, int]]
    size: int


def plan_shards(
    tensors: Sequence[_Tensor], shard_bytes: int, metadata: dict[str, str], *, stem: str = "model"
) -> list[Shard]:
    """Divide tensors into safetensors files and place each tensor.

    Shards are filled in the given order. Within a shard, tensors with larger elements come first, so that the offset of
    every tensor is a multiple of its element size.

    Args:
        tensors: name, element type and shape of each.
        shard_bytes: the most tensor bytes in one shard; a larger tensor gets a shard of its own.
        metadata: entries for the header in addition to `format: pt`.
        stem: prefix of the files' names.

    Raises:
        ValueError: a name appears twice, or is `__metadata__`, which the format reserves.
    """
    _check_names(tensors)
    groups = _groups(tensors, shard_bytes)
    count = len(groups)
    return [
        _shard(f"{stem}.safetensors" if count == 1 else f"{stem}-{i:05d}-of-{count:05d}.safetensors", group, metadata)
        for i, group in enumerate(groups, start=1)
    ]


def index_json(shards: Sequence[Shard]) -> bytes:
    """Return the text of `model.safetensors.index.json`."""
    index = {
        "metadata": {"total_size": sum(nbytes for shard in shards for _, nbytes in shard.entries.values())},
        "weight_map": {name: shard.name for shard in shards for name in shard.entries},
    }
    return json.dumps(index, indent=2, sort_keys=True).encode("utf-8") + b"\n"


def _check_names(tensors: Sequence[_Tensor]) -> None:
    seen: set[str] = set()
    for name, _, _ in tensors:
        if name in seen:
            raise ValueError(f"tensor {name!r} appears twice")
        seen.add(name)
    if "__metadata__" in seen:
        raise ValueError("a tensor cannot be named '__metadata__': safetensors keeps this name for itself")


def _groups(tensors: Sequence[_Tensor], shard_bytes: int) -> list[list[_Sized]]:
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes must be positive, found {shard_bytes}")
    groups: list[list[_Sized]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = dtype.nbytes(math.prod(shape))
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, shape, nbytes))
        filled += nbytes
    return groups


def _shard(name: str, tensors: list[_Sized], metadata: dict[str, str]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].bits)
    described: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begins: list[tuple[str, int, int]] = []
    position = 0
    for tensor_name, dtype, shape, nbytes in ordered:
        described[tensor_name] = {
            "dtype": dtype.tag,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        begins.append((tensor_name, position, nbytes))
        position += nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(_ALIGNMENT, "little") + text
    entries = {tensor_name: (len(header) + begin, nbytes) for tensor_name, begin, nbytes in begins}
    return Shard(name, header, entries, len(header) + position)
