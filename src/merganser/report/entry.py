"""Values of a JSON document that somebody else wrote, checked as they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from ..errors import CheckpointError

__all__ = ["Entry"]

T = TypeVar("T")


class Entry:
    """A value and the place where it stands.

    Every method that returns a value raises CheckpointError, with the place, where it is of another kind.

    Args:
        value: As it was parsed.
        file: What was parsed, for messages.
        place: Where in it the value stands, such as `layers[3].models`; empty for all of it.
    """

    __slots__ = ("_file", "_value", "place")

    def __init__(self, value: Any, file: str, place: str = "") -> None:
        self._value = value
        self._file = file
        self.place = place

    @property
    def where(self) -> str:
        """File and place."""
        return f"{self._file}: {self.place}" if self.place else self._file

    def __getitem__(self, key: str) -> Entry:
        found = self.get(key)
        if found is None:
            raise CheckpointError(f"{self.where}: has no {key!r}, which every such file has; is it complete?")
        return found

    def get(self, key: str) -> Entry | None:
        """Return what an object has under a key; None where it has nothing or null."""
        if not isinstance(self._value, dict):
            self.refuse("an object")
        value = self._value.get(key)
        return None if value is None else Entry(value, self._file, f"{self.place}.{key}" if self.place else key)

    def names(self) -> list[str]:
        """Return the keys of an object."""
        if not isinstance(self._value, dict):
            self.refuse("an object")
        return list(self._value)

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Yield the keys of an object and what stands there, nulls left out."""
        for key in self.names():
            found = self.get(key)
            if found is not None:
                yield key, found

    def each(self, read: Callable[[Entry], T]) -> list[T]:
        """Read every member of a list."""
        if not isinstance(self._value, list):
            self.refuse("a list")
        return [read(Entry(value, self._file, f"{self.place}[{i}]")) for i, value in enumerate(self._value)]

    def text(self) -> str:
        """Return a text."""
        return self._value if isinstance(self._value, str) else self.refuse("a text")

    def flag(self) -> bool:
        """Return true or false."""
        return self._value if isinstance(self._value, bool) else self.refuse("true or false")

    def whole(self) -> int:
        """Return a whole number of at least 0."""
        found = self._value
        return (
            found
            if isinstance(found, int) and not isinstance(found, bool) and found >= 0
            else self.refuse("a whole number")
        )

    def number(self) -> float:
        """Return a finite number."""
        found = self._value
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            self.refuse("a finite number")
        return float(found)

    def maybe(self) -> float | None:
        """Return a finite number, or None for null."""
        return None if self._value is None else self.number()

    def shown(self) -> str:
        """Return a value for a reader, whatever it is."""
        return self._value if isinstance(self._value, str) else json.dumps(self._value)

    def refuse(self, expected: str) -> NoReturn:
        """Refuse the value.

        Raises:
            CheckpointError: Always.
        """
        shown = repr(self._value)
        raise CheckpointError(
            f"{self.where}: must be {expected}, found {shown if len(shown) < 60 else shown[:57] + '...'}"
        )
