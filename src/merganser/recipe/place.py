"""Values of a recipe, and where they stand: the start of every message."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..errors import RecipeError, did_you_mean
from .scalar import MAX_INTEGER, Scalar, read_scalar, shown


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a recipe.

    Args:
        file: File name as given, or `<recipe>` for text and mappings.
        line: Line in the file from 1; 0 where there are no lines.
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
    """Refuse a key that has no meaning where it stands.

    Raises:
        RecipeError: Always.
    """
    hint = did_you_mean(key, allowed) if hint is None else hint
    raise RecipeError(f"{place}: unknown key {shown(key)}.{hint} Allowed: {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of the recipe together with its place, read with the checks that every value needs.

    Args:
        node: The parsed value.
        place: Where it stands.
        unknown: Called with every key of a mapping that has no meaning there, the place, and the keys that have one;
            raises, or returns where the key is to be ignored.
    """

    node: Node
    place: Place
    unknown: Callable[[str, Place, Collection[str]], None] = refuse_key

    @property
    def value(self) -> Scalar | list[Node] | dict[str, Node]:
        """The parsed value."""
        return self.node.value

    def error(self, problem: str) -> RecipeError:
        """Make the error that says what is wrong here."""
        return RecipeError(f"{self.place}: {problem}")

    def mapping(self, allowed: Collection[str] | None = None, required: Collection[str] = ()) -> dict[str, Entry]:
        """Return the entries of a mapping, without those left empty.

        Args:
            allowed: The keys that may occur; None allows any.
            required: The keys that must occur.

        Raises:
            RecipeError: This is no mapping, or has an unknown key, or lacks a required one.
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
                raise self.error(f"{key!r} is missing")
        return entries

    def items(self) -> list[Entry]:
        """Return the entries of a list that has at least one.

        Raises:
            RecipeError: This is no list, or an empty one.
        """
        if not isinstance(self.value, list):
            raise self.error(f"expected a list (lines that start with '- '), got {shown(self.value)}")
        if not self.value:
            raise self.error("the list is empty")
        return [
            Entry(node, Place(self.place.file, node.line, f"{self.place.key}[{i}]"), self.unknown)
            for i, node in enumerate(self.value)
        ]

    def text(self, longest: int = 1000) -> str:
        """Return a text that is not blank.

        Raises:
            RecipeError: This is not a text, or a blank one, or has more than `longest` characters.
        """
        if not isinstance(self.value, str):
            hint = "; put it in quotes" if isinstance(self.value, int | float) else ""
            raise self.error(f"expected a text, got {shown(self.value)}{hint}")
        if not self.value.strip():
            raise self.error("the text is empty")
        if len(self.value) > longest:
            raise self.error(f"a text of {len(self.value):,} characters; {longest:,} are allowed")
        return self.value

    def whole_number(self, lowest: int = 0) -> int:
        """Return a whole number; quotes around it and zeros behind its point do not matter, as in mergekit.

        Raises:
            RecipeError: This is none, or one below `lowest`.
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

    def choice(self, allowed: Mapping[str, str] | Collection[str], aliases: Mapping[str, str] | None = None) -> str:
        """Return one of the allowed texts.

        Args:
            allowed: The texts.
            aliases: Other spellings by lower-case text, for the hint in the message.

        Raises:
            RecipeError: This is none of them.
        """
        if isinstance(self.value, str) and self.value in allowed:
            return self.value
        word = str(self.value) if not isinstance(self.value, dict | list) else ""
        alias = (aliases or {}).get(word.lower())
        hint = f" Did you mean {alias!r}?" if alias else did_you_mean(word, allowed)
        raise self.error(f"{shown(self.value)} is not known.{hint} Allowed: {', '.join(allowed)}")
