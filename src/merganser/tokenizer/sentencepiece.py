"""Read the pieces of a sentencepiece model, a protocol buffer, without the sentencepiece library."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import CheckpointError

__all__ = ["read_pieces"]

# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES = 1  # ModelProto.pieces
_PIECE = 1  # SentencePiece.piece


def read_pieces(data: bytes, where: str) -> list[str]:
    """Return the pieces in the order of their ids.

    Args:
        data: The contents of the file.
        where: Name of the file, for messages.

    Raises:
        CheckpointError: The data is not a sentencepiece model.
    """
    pieces = []
    try:
        for field, start, end in _fields(data, 0, len(data)):
            if field == _PIECES:
                text = next(data[a:b] for inner, a, b in _fields(data, start, end) if inner == _PIECE)
                pieces.append(text.decode("utf-8"))
    except (ValueError, IndexError, StopIteration):
        pieces = []
    if not pieces:
        raise CheckpointError(f"{where}: is not a sentencepiece model: its pieces cannot be read")
    return pieces


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field of a message, and the offsets where its contents begin and end."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            start = at
            _, at = _varint(data, at)
        elif kind == _BYTES:
            length, start = _varint(data, at)
            at = start + length
        elif kind in (_FIXED32, _FIXED64):
            start, at = at, at + (4 if kind == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("a field is cut off")
        yield tag >> 3, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a varint (seven bits per byte, lowest first), and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of too many bytes")
