"""Write a folder of statistics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint import DTYPE_BY_NAME, plan_shards
from ...errors import OutputError
from ...files import write_whole
from ...jsonfile import os_reason
from ...statistics import STATISTICS_NAME

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sum", "file_name", "write_about", "write_json", "write_sums"]


@dataclass(frozen=True)
class Sum:
    """A sum to be written.

    Args:
        shape: Shape of the sum.
        dtype: Dtype in the file, by its name in torch.
        take: Returns the sum, in any dtype. Called once; the result is freed after it is written.
    """

    shape: tuple[int, ...]
    dtype: str
    take: Callable[[], Tensor]


def file_name(number: int, count: int, kind: str = "statistics") -> str:
    """Return the name of one of a folder's files, counted from 1."""
    return f"{kind}-{number:05d}-of-{count:05d}.safetensors"


def write_sums(file: Path, sums: Mapping[str, Sum]) -> None:
    """Write sums to one file, one after the other, so that only one of them is in memory twice.

    Args:
        file: The file; an existing one is replaced.
        sums: By their names in the file.

    Raises:
        OutputError: The disk is full or failed.
    """
    import torch

    described = [(name, DTYPE_BY_NAME[own.dtype], own.shape) for name, own in sums.items()]
    (shard,) = plan_shards(described, 1 << 63, {}, stem=file.name.removesuffix(".safetensors"))
    try:
        with file.open("wb") as target:
            target.write(shard.header)
            for name, (offset, nbytes) in shard.entries.items():
                value = sums[name].take().to(getattr(torch, sums[name].dtype)).contiguous()
                target.seek(offset)
                target.write(value.view(-1).view(torch.uint8).numpy().data if nbytes else b"")
            target.truncate(shard.size)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {os_reason(error)}; make room, or choose another disk") from None


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the description of a folder's contents atomically.

    Raises:
        OutputError: The disk is full or failed.
    """
    write_json(folder / STATISTICS_NAME, about)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, in a folder whose marker lists the temporary file `.NAME.new`.

    Raises:
        OutputError: The disk is full or failed.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(file, text, temporary=file.with_name(f".{file.name}.new"))
