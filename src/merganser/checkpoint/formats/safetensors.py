"""Parse the safetensors header, treating it as untrusted input.

8 bytes   length N of the header, little-endian
N bytes   JSON object: name -> {dtype, shape, data_offsets: [begin, end]}, and "__metadata__"
the rest  the tensors' bytes, row-major, back to back: no hole, no overlap, nothing after the last
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, NotFoundError
from ...jsonfile import LFS_MAGIC, LFS_POINTER, MAX_JSON_BYTES, open_regular, os_reason, parse_object
from ...wording import brief
from ..dtypes import DTYPES, DType
from ..ranges.fetch import Fetcher
from ..ranges.file import RemoteFile
from ..tensor import TensorInfo

__all__ = ["read_header", "read_remote_header"]

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MAX_NUMEL = 2**63
_FIRST = 1 << 17
"""Bytes of a remote file that are fetched first; most headers are shorter."""

_MOST_KEPT = 256
"""Parsed headers that are kept."""

_Entry = tuple[str, DType, tuple[int, ...], int, int]
"""Of a tensor: name, dtype, shape, first byte behind the header, and number of bytes."""

# Models of one architecture mostly have the same headers, byte for byte: each is parsed once, and its names are in
# memory once.
_parsed: dict[bytes, tuple[list[_Entry], dict[str, str]]] = {}


def read_header(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Read only the header of a safetensors file.

    Returns:
        The tensors in the order of their bytes, and the file's metadata.

    Raises:
        NotFoundError: there is no such file.
        CheckpointError: the file is malformed; the message names the file and, for a faulty entry, the tensor.
    """
    return _described(file, *_read_raw(file))


def read_remote_header(file: Path, remote: RemoteFile) -> tuple[list[TensorInfo], dict[str, str]]:
    """Read only the header of a safetensors file on the Hub.

    Args:
        file: Where a copy of it would be, for messages and as its name in tensors.
        remote: The file.

    Returns:
        As for `read_header`.

    Raises:
        CheckpointError: As for `read_header`.
        UnreachableError: The Hub stopped answering.
    """
    fetcher = Fetcher()
    position = 0

    def fetch(start: int, count: int) -> bytes:
        found = bytearray(count)
        fetcher.fetch(remote, start, memoryview(found))
        return bytes(found)

    known = fetch(0, min(_FIRST, remote.size))

    def read(count: int) -> bytes:
        nonlocal position
        start, position = position, position + count
        end = min(position, remote.size)
        missing = fetch(max(start, len(known)), end - max(start, len(known))) if end > len(known) else b""
        return known[start:end] + missing

    tensors, metadata = _described(file, _raw(file, remote.size, read), remote.size)
    return [replace(tensor, remote=remote) for tensor in tensors], metadata


def _described(file: Path, raw: bytes, size: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata of a header, for a file of `size` bytes."""
    key = hashlib.sha256(raw).digest()
    if key not in _parsed:
        found = _parse(file, raw)
        if len(_parsed) >= _MOST_KEPT:
            _parsed.clear()
        _parsed[key] = found
    entries, metadata = _parsed[key]
    start = _LENGTH_BYTES + len(raw)
    _check_end(file, entries, start, size)
    tensors = [TensorInfo(name, dtype, shape, file, start + begin, size) for name, dtype, shape, begin, size in entries]
    return tensors, dict(metadata)


def _parse(file: Path, raw: bytes) -> tuple[list[_Entry], dict[str, str]]:
    """Return the tensors of a header in the order of their bytes, and the metadata; `file` is for messages."""
    header = parse_object(raw, f"{file}: the safetensors header")
    metadata = _metadata(file, header.pop(_METADATA, None))
    entries = [_tensor(file, name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[3:])
    _check_layout(file, entries)
    return entries, metadata


def _read_raw(file: Path) -> tuple[bytes, int]:
    """Return the header's bytes and the size of the file."""
    try:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            return _raw(file, size, handle.read), size
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None


def _raw(file: Path, size: int, read: Callable[[int], bytes]) -> bytes:
    """Return the header's bytes, from a function that reads the next bytes of a file of `size` bytes."""
    if size == 0:
        raise CheckpointError(f"{file}: the file is empty; fetch it again")
    if size < _LENGTH_BYTES:
        raise CheckpointError(f"{file}: not a safetensors file: it has {size} bytes, the format needs 8 or more")
    first = read(_LENGTH_BYTES)
    if first == LFS_MAGIC:
        raise CheckpointError(f"{file}: {LFS_POINTER}")
    length = int.from_bytes(first, "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{file}: not a safetensors file, or damaged: "
            f"the header's length reads {length:,} bytes, at most {MAX_JSON_BYTES:,} are allowed"
        )
    if _LENGTH_BYTES + length > size:
        raise CheckpointError(
            f"{file}: truncated, or not a safetensors file: "
            f"the header's length reads {length} bytes, the file has {size} bytes in all; fetch it again"
        )
    raw = read(length)
    if len(raw) != length:
        raise CheckpointError(f"{file}: truncated while it was read: the header has {length} bytes, {len(raw)} came")
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file}: not a safetensors file, or damaged: the header must begin with '{{'")
    return raw


def _metadata(file: Path, entry: Any) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise CheckpointError(f"{file}: {_METADATA} of the safetensors header must map strings to strings")
    return entry


def _tensor(file: Path, name: str, entry: Any) -> _Entry:
    try:
        return _parse_tensor(name, entry)
    except _FlawError as flaw:
        raise CheckpointError(f"{file}: tensor {name!r}: {flaw}; fetch the file again, or write it again") from None


class _FlawError(Exception):
    """A fault in a tensor's entry; the caller that catches it adds the file and the tensor to the message."""


def _parse_tensor(name: str, entry: Any) -> _Entry:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise _FlawError("the name is not valid Unicode; rename the tensor") from None
    if not isinstance(entry, dict):
        raise _FlawError(f"the header's entry must be an object, found {brief(entry)}")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise _FlawError(f"the header's entry has no {key!r}")
    dtype = _dtype(entry["dtype"])
    shape = _integers("shape", entry["shape"])
    offsets = _integers("data_offsets", entry["data_offsets"])
    if len(offsets) != 2:
        raise _FlawError(f"data_offsets must be two numbers, found {len(offsets)}")
    begin, end = offsets
    if begin > end:
        raise _FlawError(f"data_offsets run backwards, from {begin} to {end}")
    nbytes = _nbytes(dtype, shape)
    if end - begin != nbytes:
        raise _FlawError(
            f"data_offsets span {end - begin} bytes, shape {brief(list(shape))} of {dtype.tag} needs {nbytes} bytes"
        )
    return name, dtype, shape, begin, nbytes


def _dtype(tag: Any) -> DType:
    dtype = DTYPES.get(tag) if isinstance(tag, str) else None
    if dtype is None:
        raise _FlawError(f"unknown dtype {brief(tag)}; known are {', '.join(DTYPES)}")
    return dtype


def _integers(key: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        for number in value:
            # compare exact types, since isinstance(True, int) holds
            if type(number) is not int or not 0 <= number < _MAX_NUMEL:
                break
        else:
            return tuple(value)
    raise _FlawError(f"{key} must be a list of non-negative 63-bit integers, found {brief(value)}")


def _nbytes(dtype: DType, shape: tuple[int, ...]) -> int:
    numel = 1
    for length in shape:
        # Check the bound at each step: multiplying a million large numbers would take minutes.
        numel *= length
        if numel >= _MAX_NUMEL:
            raise _FlawError(f"shape {brief(list(shape))} has more than 2^63 elements")
    if numel * dtype.bits % 8:
        raise _FlawError(f"{numel} elements of {dtype.tag} do not fill whole bytes")
    return numel * dtype.bits // 8


def _check_layout(file: Path, entries: list[_Entry]) -> None:
    """Check that the tensors, sorted by their first byte, are contiguous."""
    position, previous = 0, ""
    for name, _, _, begin, nbytes in entries:
        if begin < position:
            raise CheckpointError(
                f"{file}: tensors {previous!r} and {name!r} overlap; fetch the file again, or write it again"
            )
        if begin > position:
            raise CheckpointError(
                f"{file}: tensor {name!r}: {begin - position} bytes before it belong to no tensor; fetch the file again, or write it again"
            )
        position, previous = begin + nbytes, name


def _check_end(file: Path, entries: list[_Entry], start: int, size: int) -> None:
    """Check that the tensors, contiguous from the byte `start`, fill a file of `size` bytes."""
    position = start + sum(entries[-1][3:]) if entries else start
    if position > size:
        past = next(name for name, _, _, begin, nbytes in entries if start + begin + nbytes > size)
        raise CheckpointError(
            f"{file}: truncated: header promises {position} bytes, file has {size}; "
            f"tensor {past!r} runs past the end; fetch the file again"
        )
    if position < size:
        raise CheckpointError(
            f"{file}: {size - position} bytes after the last tensor: header promises {position} bytes, file has {size}"
        )
