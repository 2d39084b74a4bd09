"""Values of a recipe and the places where they stand, with which every message begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ...errors import RecipeError, did_you_mean
from .scalar import FLAGS, MAX_INTEGER, Scalar, read_scalar, shown


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a recipe.

    Args:
        file: File name as given, or `<recipe>` for text and mappings.
        line: Line in the file, counted from 1; 0 if the source has no lines.
        key: Path of keys, as in `models[1].parameters`; empty for the whole recipe.
    """

    file: str
    line: int
    key: str

    def __str__(self) -> str:
        return " ".join(filter(None, [f"{self.file}:{self.line}" if self.line else self.file, self.key]))


@dataclass(frozen=True, slots=True)
class Node:
    """A parsed value: a scalar, or a list or mapping of nodes; `line` is where its key (or dash) is written."""

    value: Scalar | list[Node] | dict[str, Node]
    line: int


def refuse_key(key: str, place: Place, allowed: Collection[str], hint: str | None = None) -> None:
    """Raise the error for a key that has no meaning where it stands.

    Raises:
        RecipeError: Always.
    """
    hint = did_you_mean(key, allowed) if hint is None else hint
    raise RecipeError(f"{place}: unknown key {shown(key)}.{hint} Allowed: {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of the recipe together with its place; its methods check and read the value.

    Args:
        node: The parsed value.
        place: Where the value stands.
        unknown: Called with every key of a mapping that has no meaning there, the place, and the keys that are allowed;
            raises, or returns to have the key ignored.
    """

    node: Node
    place: Place
    unknown: Callable[[str, Place, Collection[str]], None] = refuse_key

    @property
    def value(self) -> Scalar | list[Node] | dict[str, Node]:
        """The parsed value."""
        return self.node.value

    def error(self, problem: str) -> RecipeError:
        """Return the error for a problem at this place."""
        return RecipeError(f"{self.place}: {problem}")

    def mapping(self, allowed: Collection[str] | None = None, required: Collection[str] = ()) -> dict[str, Entry]:
        """Return the entries of a mapping, without those whose value is empty.

        Args:
            allowed: The keys that may occur; None allows any.
            required: The keys that must occur.

        Raises:
            RecipeError: The value is not a mapping, has an unknown key, or lacks a required one.
        """
        if not isinstance(self.value, dict):
            keys = f" with the keys {', '.join(allowed)}" if allowed else ""
            raise self.error(f"expected a mapping{keys}, got {shown(self.value)}")
        entries = {}
        for key, node in self.value.items():
            if allowed is not None and key not in allowed:
                self.unknown(key, Place(self.place.file, node.line, self.place.key), allowed)
            elif node.value is not None:
                path = f"{self.place.key}.{key}" if self.place.key else key
                entries[key] = Entry(node, Place(self.place.file, node.line, path), self.unknown)
        for key in required:
            if key not in entries:
                raise self.error(f"{key!r} is missing; add it")
        return entries

    def items(self) -> list[Entry]:
        """Return the entries of a list, which must not be empty.

        Raises:
            RecipeError: The value is not a list, or is empty.
        """
        if not isinstance(self.value, list):
            raise self.error(f"expected a list (lines that start with '- '), got {shown(self.value)}")
        if not self.value:
            raise self.error("the list is empty; write at least one entry, or leave the key out")
        return [
            Entry(node, Place(self.place.file, node.line, f"{self.place.key}[{i}]"), self.unknown)
            for i, node in enumerate(self.value)
        ]

    def text(self, longest: int = 1000, *, blank: bool = False) -> str:
        """Return a string that is not blank, unless `blank` allows that.

        Raises:
            RecipeError: The value is not a string, is blank, or has more than `longest` characters.
        """
        if not isinstance(self.value, str):
            hint = "; put it in quotes" if isinstance(self.value, int | float) else ""
            raise self.error(f"expected a text, got {shown(self.value)}{hint}")
        if not blank and not self.value.strip():
            raise self.error("the text is empty; write a value, or leave the key out")
        if len(self.value) > longest:
            raise self.error(f"a text of {len(self.value):,} characters; {longest:,} are allowed")
        return self.value

    def whole_number(self, lowest: int = 0) -> int:
        """Return a whole number; quotes around it and zeros after the decimal point are accepted, as in mergekit.

        Raises:
            RecipeError: The value is not a whole number, or is below `lowest`.
        """
        value = self.value
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = read_scalar(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < MAX_INTEGER:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise self.error(f"expected a whole number of at least {lowest}, got {shown(self.value)}")
        return value

    def flag(self) -> bool:
        """Return a truth value; quotes around it are accepted, as in mergekit.

        Raises:
            RecipeError: The value is not a truth value.
        """
        value = FLAGS.get(self.value) if isinstance(self.value, str) else self.value
        if not isinstance(value, bool):
            raise self.error(f"expected true or false, got {shown(self.value)}")
        return value

    def choice(self, allowed: Mapping[str, str] | Collection[str], aliases: Mapping[str, str] | None = None) -> str:
        """Return the value, which must be one of the allowed strings.

        Args:
            allowed: The allowed strings.
            aliases: Allowed string by the lower-case form of another spelling, for the hint in the message.

        Raises:
            RecipeError: The value is not allowed.
        """
        if isinstance(self.value, str) and self.value in allowed:
            return self.value
        word = str(self.value) if not isinstance(self.value, dict | list) else ""
        alias = (aliases or {}).get(word.lower())
        hint = f" Did you mean {alias!r}?" if alias else did_you_mean(word, allowed)
        raise self.error(f"{shown(self.value)} is not known.{hint} Allowed: {', '.join(allowed)}")
