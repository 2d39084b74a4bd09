"""The position of every byte of a GGUF file to be written, and its header, made from that of another file."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ....errors import CheckpointError
from ....jsonfile import os_reason
from ...layout import Shard
from .header import TYPES, GgufHeader, GgufTensor, GgufType

__all__ = ["GgufOutput", "lay_out_gguf"]

_VERSION = 3
_ALIGNMENT = 32
_UINT32, _STRING = 4, 8
_NUMBERS = {kind.name: number for number, kind in TYPES.items()}


@dataclass(frozen=True, slots=True)
class GgufOutput:
    """A tensor to be written.

    Args:
        name: Its name in the file.
        shape: Its shape, the fastest dimension last.
        type: Its type.
        parts: Names and sizes in bytes of the tensors that it consists of, one after the other: one, or one per expert.
    """

    name: str
    shape: tuple[int, ...]
    type: GgufType
    parts: tuple[tuple[str, int], ...]


def lay_out_gguf(
    name: str,
    like: tuple[Path, GgufHeader],
    changes: Mapping[str, str | int | None],
    kept: Sequence[tuple[Path, GgufTensor]],
    tensors: Sequence[GgufOutput],
) -> Shard:
    """Return the layout of a file with the entries of another one.

    Args:
        name: Name of the file.
        like: The file whose entries are copied, and its header.
        changes: Entries that differ: another value, or None to leave it out.
        kept: Small tensors of files that are copied as they are; they count as part of the header.
        tensors: The other tensors, in the order of the file.

    Raises:
        CheckpointError: A file cannot be read.
    """
    entries = _entries(*like, {**changes, "general.alignment": None})
    described: list[bytes] = []
    position = 0
    copied = b""
    for file, tensor in kept:
        described.append(_described(tensor.name, tensor.shape, tensor.type, position))
        data = _read(file, tensor.offset, tensor.nbytes)
        copied += data + b"\0" * (-len(data) % _ALIGNMENT)
        position = len(copied)
    places: dict[str, tuple[int, int]] = {}
    for each in tensors:
        described.append(_described(each.name, each.shape, each.type, position))
        for part, nbytes in each.parts:
            places[part] = position, nbytes
            position += nbytes
        position += -position % _ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", _VERSION, len(described), len(entries)) + b"".join((*entries, *described))
    header += b"\0" * (-len(header) % _ALIGNMENT)
    start = len(header)
    found = {part: (start + at, nbytes) for part, (at, nbytes) in places.items()}
    return Shard(name, header + copied, found, start + position)


def _entries(file: Path, header: GgufHeader, changes: Mapping[str, str | int | None]) -> list[bytes]:
    found = []
    for key, (start, end) in header.places.items():
        if key not in changes:
            found.append(_read(file, start, end - start))
        elif changes[key] is not None:
            found.append(_entry(key, changes[key]))
    return found + [
        _entry(key, value) for key, value in changes.items() if key not in header.places and value is not None
    ]


def _entry(key: str, value: str | int | None) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _STRING) + _text(value)
    return _text(key) + struct.pack("<II", _UINT32, value)


def _text(text: str) -> bytes:
    data = text.encode(errors="replace")
    return struct.pack("<Q", len(data)) + data


def _described(name: str, shape: tuple[int, ...], kind: GgufType, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], _NUMBERS[kind.name], offset)
    return _text(name) + numbers


def _read(file: Path, start: int, nbytes: int) -> bytes:
    try:
        with file.open("rb") as handle:
            handle.seek(start)
            data = handle.read(nbytes)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    if len(data) < nbytes:
        raise CheckpointError(f"{file}: truncated; was the file changed meanwhile?")
    return data
