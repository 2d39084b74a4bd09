"""Parse the safetensors header, treating it as untrusted input.

8 bytes   length N of the header, little-endian
N bytes   JSON object: name -> {dtype, shape, data_offsets: [begin, end]}, and "__metadata__"
the rest  the tensors' bytes, row-major, back to back: no hole, no overlap, nothing after the last
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, NotFoundError
from ...jsonfile import LFS_MAGIC, LFS_POINTER, MAX_JSON_BYTES, open_regular, os_reason, parse_object
from ...wording import brief
from ..dtypes import DTYPES, DType
from ..tensor import TensorInfo

__all__ = ["read_header"]

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MAX_NUMEL = 2**63


def read_header(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Read only the header of a safetensors file.

    Returns:
        The tensors in the order of their bytes, and the file's metadata.

    Raises:
        NotFoundError: there is no such file.
        CheckpointError: the file is malformed; the message names the file and, for a faulty entry, the tensor.
    """
    raw, size = _read_raw(file)
    header = parse_object(raw, f"{file}: the safetensors header")
    metadata = _metadata(file, header.pop(_METADATA, None))
    start = _LENGTH_BYTES + len(raw)
    tensors = [_tensor(file, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(file, tensors, start, size)
    return tensors, metadata


def _read_raw(file: Path) -> tuple[bytes, int]:
    """Return the header's bytes and the size of the file."""
    try:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{file}: the file is empty; fetch it again")
            if size < _LENGTH_BYTES:
                raise CheckpointError(
                    f"{file}: not a safetensors file: it has {size} bytes, the format needs 8 or more"
                )
            first = handle.read(_LENGTH_BYTES)
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
            raw = handle.read(length)
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    if len(raw) != length:
        raise CheckpointError(f"{file}: truncated while it was read: the header has {length} bytes, {len(raw)} came")
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file}: not a safetensors file, or damaged: the header must begin with '{{'")
    return raw, size


def _metadata(file: Path, entry: Any) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise CheckpointError(f"{file}: {_METADATA} of the safetensors header must map strings to strings")
    return entry


def _tensor(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        return _parse_tensor(file, name, entry, start)
    except _FlawError as flaw:
        raise CheckpointError(f"{file}: tensor {name!r}: {flaw}") from None


class _FlawError(Exception):
    """A fault in a tensor's entry; the caller that catches it adds the file and the tensor to the message."""


def _parse_tensor(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise _FlawError("the name is not valid Unicode") from None
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
    return TensorInfo(name, dtype, shape, file, start + begin, nbytes)


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


def _check_layout(file: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Check that the tensors, sorted by offset, are contiguous and fill the file."""
    position, previous = start, ""
    for tensor in tensors:
        if tensor.offset < position:
            raise CheckpointError(f"{file}: tensors {previous!r} and {tensor.name!r} overlap")
        if tensor.offset > position:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r}: {tensor.offset - position} bytes before it belong to no tensor"
            )
        position, previous = tensor.offset + tensor.nbytes, tensor.name
    if position > size:
        past = next(tensor.name for tensor in tensors if tensor.offset + tensor.nbytes > size)
        raise CheckpointError(
            f"{file}: truncated: header promises {position} bytes, file has {size}; "
            f"tensor {past!r} runs past the end; fetch the file again"
        )
    if position < size:
        raise CheckpointError(
            f"{file}: {size - position} bytes after the last tensor: header promises {position} bytes, file has {size}"
        )
