"""Parse the header of a GGUF file, treating it as untrusted input.

magic "GGUF", version (2 or 3), number of tensors, number of entries; the entries (key, type, value); per tensor name,
dimensions (the fastest first), type and offset; padding to `general.alignment`; the tensors' bytes. Little-endian.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import CheckpointError, NotFoundError, UnsupportedError
from ....jsonfile import LFS_MAGIC, LFS_POINTER, open_regular, os_reason
from ....wording import brief

__all__ = ["TYPES", "TYPE_BY_NAME", "GgufHeader", "GgufTensor", "GgufType", "read_gguf_header"]

_MAGIC = b"GGUF"
_MOST_TENSORS = 1_000_000
_MOST_ENTRIES = 100_000
_MOST_NAME = 64 * 8
_MOST_TEXT = 1 << 24
_MOST_NUMBERS = 4096
_MAX_NUMEL = 2**63
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufType:
    """A way of storing values: so many values in so many bytes."""

    name: str
    values: int
    nbytes: int


TYPES: dict[int, GgufType] = {
    number: GgufType(name, values, nbytes)
    for number, name, values, nbytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
}
"""The types of tensors by their numbers in files."""

TYPE_BY_NAME = {kind.name: kind for kind in TYPES.values()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor: its shape in the usual order (the fastest dimension last), and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header says.

    Args:
        fields: The entries; of arrays of texts, and of long arrays, only the length.
        tensors: In the order of the header.
        places: Where each entry lies in the file: its first byte, and the one after its last.
    """

    fields: Mapping[str, Any]
    tensors: list[GgufTensor]
    places: Mapping[str, tuple[int, int]]

    @property
    def architecture(self) -> str:
        """The family of the model, as llama.cpp calls it."""
        return str(self.fields.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """Return a whole number of the architecture, as in `llama.attention.head_count`; None if it is not there."""
        found = self.fields.get(f"{self.architecture}.{key}")
        return found if type(found) is int else None


def read_gguf_header(file: Path) -> GgufHeader:
    """Read only the header of a GGUF file.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It is malformed.
        UnsupportedError: Its version or byte order cannot be read.
    """
    try:
        with open_regular(file) as handle:
            start = handle.read(len(LFS_MAGIC))
            if not start:
                raise CheckpointError(f"{file}: the file is empty; fetch it again")
            if start == LFS_MAGIC:
                raise CheckpointError(f"{file}: {LFS_POINTER}")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(file, data).header()
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file") from None
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None


class _Parser:
    """Reads one value after another, and never beyond the end of the file."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file = file
        self._data = data
        self._at = 0
        self._size = len(data)

    def header(self) -> GgufHeader:
        if self._take(4) != _MAGIC:
            raise self._flaw("not a GGUF file: it does not begin with 'GGUF'")
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise UnsupportedError(
                f"{self._file}: the file is big-endian, only little-endian ones can be read; convert it with gguf-convert-endian of the gguf package"
            )
        if version not in (2, 3):
            raise UnsupportedError(
                f"{self._file}: GGUF version {version} cannot be read, only 2 and 3; convert the model again with a current llama.cpp"
            )
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        if tensors > _MOST_TENSORS or entries > _MOST_ENTRIES:
            raise self._flaw(
                f"the header counts {tensors:,} tensors and {entries:,} entries; at most {_MOST_TENSORS:,} and "
                f"{_MOST_ENTRIES:,} are accepted"
            )
        fields: dict[str, Any] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(entries):
            start = self._at
            key = self._text(_MOST_NAME, "a key")
            if key in fields:
                raise self._flaw(f"entry {key!r} is there twice")
            fields[key] = self._value(key, self._scalar("I"))
            places[key] = start, self._at
        listed = [self._tensor() for _ in range(tensors)]
        found = self._placed(listed, self._alignment(fields))
        return GgufHeader(fields, found, places)

    def _flaw(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {what}")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._flaw(f"truncated: the header goes on after the end of the file ({self._size:,} bytes)")
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise self._flaw(f"truncated: the header goes on after the end of the file ({self._size:,} bytes)")
        self._at += count

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _text(self, most: int, what: str) -> str:
        length = self._scalar("Q")
        if length > most:
            raise self._flaw(f"{what} of {length:,} bytes; at most {most:,} are accepted")
        try:
            found = self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._flaw(f"{what} is not valid UTF-8") from None
        if "\0" in found and what != "a text":
            raise self._flaw(f"{what} holds a NUL character: {brief(found)}")
        return found

    def _value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text(_MOST_TEXT, "a text")
        if kind != _ARRAY:
            raise self._flaw(f"entry {key!r} has the type {kind}, which does not exist")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            size = count * struct.calcsize(code)
            if count <= _MOST_NUMBERS:
                return list(struct.unpack(f"<{count}{code}", self._take(size)))
            self._skip(size)
            return count
        if inner != _STRING:
            raise self._flaw(f"entry {key!r} is a list of the type {inner}, which cannot be read")
        unpack, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
        if count * 8 > self._size - at:
            raise self._flaw(f"entry {key!r} counts {count:,} texts, which the file cannot hold")
        for _ in range(count):
            # not _text: vocabularies have hundreds of thousands of entries
            if at + 8 > self._size:
                raise self._flaw(f"truncated: entry {key!r} goes on after the end of the file")
            at += 8 + unpack(data, at)[0]
        if at > self._size:
            raise self._flaw(f"truncated: entry {key!r} goes on after the end of the file")
        self._at = at
        return count

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(_MOST_NAME, "the name of a tensor")
        count = self._scalar("I")
        if not 0 < count <= 8:
            raise self._flaw(f"tensor {name!r}: {count} dimensions; 1 to 8 are accepted")
        shape = tuple(self._scalar("Q") for _ in range(count))
        if not all(0 < length < _MAX_NUMEL for length in shape) or math.prod(shape) >= _MAX_NUMEL:
            raise self._flaw(f"tensor {name!r}: shape {brief(list(shape))} is empty or too large")
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _alignment(self, fields: Mapping[str, Any]) -> int:
        found = fields.get("general.alignment", 32)
        if type(found) is not int or not 0 < found <= 1 << 20 or found & (found - 1):
            raise self._flaw(f"general.alignment must be a power of two, found {brief(found)}")
        return found

    def _placed(self, listed: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> list[GgufTensor]:
        start = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, number, offset in listed:
            kind = TYPES.get(number)
            if kind is None:
                raise UnsupportedError(f"{self._file}: tensor {name!r}: the type {number} is not known")
            if shape[-1] % kind.values:
                raise self._flaw(
                    f"tensor {name!r}: rows of {shape[-1]} do not fill blocks of {kind.name}, {kind.values}"
                )
            if offset % alignment:
                raise self._flaw(f"tensor {name!r}: offset {offset} is not a multiple of the alignment {alignment}")
            if name in found:
                raise self._flaw(f"tensor {name!r} is there twice")
            nbytes = math.prod(shape) // kind.values * kind.nbytes
            if start + offset + nbytes > self._size:
                raise self._flaw(
                    f"truncated: tensor {name!r} ends at byte {start + offset + nbytes:,}, the file has {self._size:,}"
                )
            found[name] = GgufTensor(name, shape, kind, start + offset, nbytes)
        ordered = sorted(found.values(), key=lambda tensor: tensor.offset)
        for first, second in itertools.pairwise(ordered):
            if first.offset + first.nbytes > second.offset:
                raise self._flaw(f"tensors {first.name!r} and {second.name!r} overlap; fetch the file again")
        return list(found.values())
