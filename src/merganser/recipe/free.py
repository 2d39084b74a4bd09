"""Values of a recipe that are left to a search: `{search: [low, high]}` and `{choices: [...]}`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RecipeError
from .document.parsing import plain
from .document.place import Entry, Node, Place
from .document.scalar import shown

AUTO_RANGE = "auto"
"""Value of `search` for the range that the merge method gives its parameter."""

Path = tuple[str | int, ...]

_MARKS = ("search", "choices")
_KEYS = (*_MARKS, "log", "step", "per")
_LAYERS = re.compile(r"layers:([0-9]{1,4})")


@dataclass(frozen=True, slots=True)
class FreeValue:
    """A value that is left to a search.

    Args:
        path: Keys and indices from the root of its document.
        place: Where it stands.
        bounds: Lowest and highest value; None to take those of the method's parameter.
        choices: Values to choose from; None for a range.
        log: Whether ratios matter and not differences.
        step: Distance between the values of a grid; None for any value of the range.
        per_model: Whether each model has a value of its own.
        per_role: Whether attention, MLP, and the other tensors have values of their own.
        layers: Number of values along the depth, between which the merge interpolates; 1 for the same at every depth.
    """

    path: Path
    place: Place
    bounds: tuple[float, float] | None
    choices: tuple[Any, ...] | None
    log: bool
    step: float | None
    per_model: bool
    per_role: bool
    layers: int

    @property
    def parameter(self) -> str | None:
        """Name of the method's parameter that this is a value of; None for another key of the recipe."""
        keys = [key for key in self.path if isinstance(key, str)]
        return keys[keys.index("parameters") + 1] if "parameters" in keys[:-1] else None


def free_values(root: Node, file: str) -> list[FreeValue]:
    """Return the free values of a document, in the order in which they are written.

    Args:
        root: The document.
        file: Name of the file, for messages.

    Raises:
        RecipeError: A free value is malformed.
    """
    return [read_free(path, entry) for path, entry in _find((), Entry(root, Place(file, root.line, "")))]


def refuse_free_values(root: Entry) -> None:
    """Refuse a recipe with free values, which cannot be merged as it is.

    Raises:
        RecipeError: There is one.
    """
    if isinstance(root.value, dict) and "path" in root.value:
        raise root.error(
            f"'path' leaves open which layers follow each other; find it with: merganser search {root.place.file} OUT "
            "--tasks ..."
        )
    for _, entry in _find((), root):
        raise entry.error(
            f"this value is left open, and a merge needs it; find it with: merganser search {root.place.file} OUT "
            "--tasks ..."
        )


def _find(path: Path, entry: Entry) -> Iterator[tuple[Path, Entry]]:
    """Yield the free values below an entry, on an explicit path, so that each is read with its place."""
    value = entry.value
    if isinstance(value, dict):
        if path and any(mark in value for mark in _MARKS):
            yield path, entry
            return
        for key, node in value.items():
            inner = f"{entry.place.key}.{key}" if entry.place.key else key
            place = Place(entry.place.file, node.line, inner)
            yield from _find((*path, key), Entry(node, place))
    elif isinstance(value, list):
        for index, node in enumerate(value):
            place = Place(entry.place.file, node.line, f"{entry.place.key}[{index}]")
            yield from _find((*path, index), Entry(node, place))


def read_free(path: Path, entry: Entry) -> FreeValue:
    """Read a free value.

    Args:
        path: Keys and indices from the root of its document.
        entry: The value.

    Raises:
        RecipeError: It is malformed.
    """
    fields = entry.mapping(_KEYS)
    if "search" in fields and "choices" in fields:
        raise entry.error("give 'search' with a range, or 'choices', not both")
    if not any(mark in fields for mark in _MARKS):
        raise entry.error(f"'search' is empty; give [low, high], or {AUTO_RANGE}")
    direct = len(path) > 1 and path[-2] == "parameters"
    per_model, per_role, layers = _read_per(fields.get("per"), direct=direct)
    read = FreeValue(
        path=path,
        place=entry.place,
        bounds=None,
        choices=None,
        log=False,
        step=None,
        per_model=per_model,
        per_role=per_role,
        layers=layers,
    )
    if "choices" in fields:
        for key in ("log", "step"):
            if key in fields:
                raise fields[key].error(f"{key!r} is for a range; choices have none")
        return replace(read, choices=_read_choices(fields["choices"]))
    bounds = _read_bounds(fields["search"])
    log = fields["log"].flag() if "log" in fields else False
    step = _number(fields["step"]) if "step" in fields else None
    if log and step is not None:
        raise fields["step"].error("a logarithmic range has no step; leave 'step' or 'log' out")
    if log and bounds is not None and bounds[0] <= 0:
        raise fields["search"].error(f"a logarithmic range begins above 0, got {bounds[0]:g}")
    if step is not None and (step <= 0 or (bounds is not None and step > bounds[1] - bounds[0])):
        raise fields["step"].error(f"must be above 0 and fit into the range, got {step:g}")
    return replace(read, bounds=bounds, log=log, step=step)


def _read_bounds(entry: Entry) -> tuple[float, float] | None:
    if entry.value == AUTO_RANGE:
        return None
    if not isinstance(entry.value, list) or len(entry.value) != 2:
        raise entry.error(f"expected [low, high], two numbers, or {AUTO_RANGE}; got {shown(entry.value)}")
    low, high = (_number(item) for item in entry.items())
    if low >= high:
        hint = f" Did you mean [{high:g}, {low:g}]?" if low > high else " Write the value itself."
        raise entry.error(f"a range ends above its beginning, got [{low:g}, {high:g}].{hint}")
    return low, high


def _read_choices(entry: Entry) -> tuple[Any, ...]:
    found = [plain(item.node) for item in entry.items()]
    if len(found) < 2:
        raise entry.error("a list of one choice; give two or more, or write the value itself")
    for index, choice in enumerate(found):
        if choice in found[:index] and type(choice) is type(found[found.index(choice)]):
            raise entry.error(f"{shown(choice)} is listed twice; list it once")
    return tuple(found)


def _read_per(entry: Entry | None, *, direct: bool) -> tuple[bool, bool, int]:
    if entry is None:
        return False, False, 1
    if not direct:
        raise entry.error("'per' is for the value of a parameter as a whole, below 'parameters'")
    items = entry.items() if isinstance(entry.value, list) else [entry]
    per_model, per_role, layers = False, False, 1
    for item in items:
        word = item.text()
        match = _LAYERS.fullmatch(word)
        if word == "model":
            per_model = True
        elif word == "role":
            per_role = True
        elif match and int(match[1]) > 1:
            layers = int(match[1])
        else:
            raise item.error(f"expected model, role, or layers:N with N of at least 2; got {shown(word)}")
    return per_model, per_role, layers


def _number(entry: Entry) -> float:
    if isinstance(entry.value, bool) or not isinstance(entry.value, int | float):
        raise entry.error(f"expected a number, got {shown(entry.value)}")
    return entry.value


def check_within(free: FreeValue, allowed: Any, words: str) -> None:
    """Refuse a range that leaves what a parameter allows.

    Args:
        free: The free value.
        allowed: What contains the allowed numbers.
        words: The allowed values in words.

    Raises:
        RecipeError: An end of the range is not allowed.
    """
    for end in free.bounds or ():
        if end not in allowed:
            raise RecipeError(f"{free.place}.search: {end:g} is out of range: {free.parameter} must be {words}")
