"""Pieces of remote tensors in memory: one request brings several blocks, and threads share what they need."""

from __future__ import annotations

import threading
from collections import OrderedDict

from .fetch import Fetcher
from .file import RemoteFile

__all__ = ["PIECE", "Pieces"]

PIECE = 4 << 20
"""Bytes of a tensor that are fetched with one request, unless more are read at once."""

_LEAST = 4 * PIECE


class Pieces:
    """Reads remote tensors through a cache of their latest pieces; safe to use from many threads at once.

    A tensor is cut into pieces from its first byte on, so that nothing but tensors is fetched. A read that covers a
    tensor, or is longer than a piece, goes past the cache.

    Args:
        nbytes: The size of the cache; pieces that threads work on should fit. 0: exactly what is read is fetched.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._most = max(nbytes, _LEAST) if nbytes else 0
        self._held = 0
        self._fetcher = Fetcher()
        self._pieces: OrderedDict[tuple[RemoteFile, int, int], _Piece] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, file: RemoteFile, offset: int, nbytes: int, start: int, target: memoryview) -> None:
        """Fill `target` with bytes of a tensor.

        Args:
            file: The file.
            offset: First byte of the tensor in the file.
            nbytes: Size of the tensor.
            start: First byte wanted, counted from the beginning of the tensor.
            target: Its length is the number of bytes to read.

        Raises:
            CheckpointError: As for `Fetcher.fetch`.
        """
        if not self._most or len(target) >= min(PIECE, nbytes):
            self._fetcher.fetch(file, offset + start, target)
            return
        at, end = start, start + len(target)
        while at < end:
            first = at // PIECE * PIECE
            last = min(first + PIECE, nbytes)
            upto = min(end, last)
            data = self._piece(file, offset + first, last - first, done=upto == last)
            target[at - start : upto - start] = data[at - first : upto - first]
            at = upto

    def _piece(self, file: RemoteFile, offset: int, nbytes: int, *, done: bool) -> memoryview:
        """Return a piece; `done`: its last byte is read now, so that it is the first to go."""
        key = file, offset, nbytes
        with self._lock:
            piece = self._pieces.get(key)
            if piece is None:
                piece = self._pieces[key] = _Piece()
                self._held += nbytes
            self._pieces.move_to_end(key, last=not done)
            while self._held > self._most and len(self._pieces) > 1:
                oldest = next(each for each in self._pieces if each != key)
                del self._pieces[oldest]
                self._held -= oldest[2]
        with piece.lock:
            if piece.data is None:
                memory = memoryview(bytearray(nbytes))
                self._fetcher.fetch(file, offset, memory)
                piece.data = memory
            return piece.data


class _Piece:
    """Bytes of a tensor, once they are there; its lock is held by the thread that fetches them."""

    __slots__ = ("data", "lock")

    def __init__(self) -> None:
        self.data: memoryview | None = None
        self.lock = threading.Lock()
