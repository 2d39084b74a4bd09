"""Refuse a pickle that torch's restricted unpickler would work on practically forever.

Sixty tuples, each of which holds the one before it twice, fit into a kilobyte, and hashing the last one takes practically
forever. The opcodes are followed without making any object, so the cost of every value is known before torch loads it.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Protocol

__all__ = ["why_costly", "why_costly_pickle"]

_MOST_VALUES = 10_000_000
"""Largest number of values that one may consist of, repeats counted; the largest checkpoints have about a million."""

_MOST_REMEMBERED = 100_000_000
"""Largest number under which a value is kept for later use: Python's unpickler makes room for all below it."""

_MOST_BYTES = 1 << 30
"""Largest size of the pickle in a zip file, which does not hold the weights."""

_LONGEST_ENCODED = 100_000
"""Largest length of a string in a pickle that calls codecs, some of which take quadratic time."""

_LEGACY_PICKLES = 5
"""A file in torch's old format begins with five pickles: magic number, version, system, contents, names of storages."""

_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "STACK_GLOBAL": 2, "BINPERSID": 1}
"""Opcodes that replace so many values on the stack by one that holds them."""

_ADDS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
"""Opcodes that add so many values to the one below them on the stack."""

_MARKED = frozenset({"TUPLE", "LIST", "DICT", "FROZENSET"})
_ADDS_MARKED = frozenset({"APPENDS", "SETITEMS", "ADDITEMS"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


def why_costly(file: Path, *, zipped: bool) -> str | None:
    """Return why loading a file would take too long, or None.

    What is not a pickle, or not a valid one, is left to torch, which refuses it.

    Args:
        file: A file that `torch.save` may have written.
        zipped: Whether it is a zip file, as since torch 1.6.
    """
    try:
        if not zipped:
            with file.open("rb") as handle:
                return next(filter(None, (_why_costly(handle) for _ in range(_LEGACY_PICKLES))), None)
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not entry.filename.endswith("data.pkl"):
                    continue
                if entry.file_size > _MOST_BYTES:
                    return f"its pickle has {entry.file_size:,} bytes"
                with archive.open(entry) as handle:
                    if why := _why_costly(handle):
                        return why
    except Exception:  # a damaged archive may raise any type
        pass
    return None


def why_costly_pickle(handle: IO[bytes], most: int = _MOST_VALUES) -> str | None:
    """Return why reading a pickle would take too long, or None; as `why_costly`, for a pickle that is not a file of torch.

    Args:
        handle: The pickle.
        most: Largest number of values that one may consist of.
    """
    return _why_costly(handle, most)


class _Value:
    """A value on the stack: the number of values that it consists of, repeats counted."""

    __slots__ = ("count",)

    def __init__(self, count: int = 1) -> None:
        self.count = count


class _Opcode(Protocol):
    name: str


def _why_costly(handle: IO[bytes], most: int = _MOST_VALUES) -> str | None:
    opcodes: Iterable[tuple[_Opcode, object, int | None]] = pickletools.genops(handle)
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[object, _Value] = {}
    longest, encodes = 0, False
    try:
        for opcode, argument, _ in opcodes:
            name = opcode.name
            if isinstance(argument, str | bytes):
                longest = max(longest, len(argument))
                encodes |= name == "GLOBAL" and argument == "_codecs encode"
            _follow(name, argument, stack, marks, memo)
            if name in _PUTS and isinstance(argument, int) and argument > _MOST_REMEMBERED:
                return f"it keeps a value under the number {argument:,}"
            if stack and stack[-1].count > most:
                return "its values are nested so that reading them would take practically forever"
    except Exception:  # not a valid pickle
        return None
    if encodes and longest > _LONGEST_ENCODED:
        return "it encodes a long string, which may take practically forever"
    return None


def _follow(name: str, argument: object, stack: list[_Value], marks: list[int], memo: dict[object, _Value]) -> None:
    """Do to the stack what an opcode does."""
    if name in _TUPLES:
        parts = [stack.pop() for _ in range(_TUPLES[name])]
        stack.append(_Value(1 + sum(part.count for part in parts)))
    elif name in _ADDS:
        parts = [stack.pop() for _ in range(_ADDS[name])]
        stack[-1].count += sum(part.count for part in parts)
    elif name == "MARK":
        marks.append(len(stack))
    elif name in _MARKED or name in _ADDS_MARKED or name == "POP_MARK":
        start = marks.pop()
        count = sum(part.count for part in stack[start:])
        del stack[start:]
        if name in _MARKED:
            stack.append(_Value(1 + count))
        elif name in _ADDS_MARKED:
            stack[-1].count += count
    elif name in _PUTS or name == "MEMOIZE":
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in _GETS:
        stack.append(memo[argument])
    elif name == "POP":
        stack.pop()
    elif name == "DUP":
        stack.append(stack[-1])
    elif name not in _IGNORED:
        stack.append(_Value())
