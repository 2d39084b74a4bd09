"""Values of parameters: scalars, layer schedules, and filters on tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..document.place import Entry, Place
from ..document.scalar import shown

Value: TypeAlias = "str | int | float | bool"

_MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class Rule:
    """Values for the tensors whose name contains the filter.

    Args:
        filter: Substring of the tensor's name, case-sensitive; None matches every tensor.
        values: One value, or a layer schedule.
        place: Where the values stand in the recipe.
    """

    filter: str | None
    values: tuple[Value, ...]
    place: Place

    def matches(self, name: str) -> bool:
        """Return whether the rule applies to the tensor of that name."""
        return self.filter is None or self.filter in name


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of a parameter at one level of a recipe: a list of rules, of which the first that matches applies."""

    rules: tuple[Rule, ...]
    place: Place

    @classmethod
    def parse(cls, entry: Entry) -> Setting:
        """Read a scalar, a list of scalars, one `{filter, value}`, or a list of `{filter, value}`.

        Raises:
            RecipeError: The entry is none of these.
        """
        node = entry.value
        if isinstance(node, list) and any(isinstance(item.value, dict) for item in node):
            return cls(tuple(_rule(item) for item in entry.items()), entry.place)
        return cls((_rule(entry) if isinstance(node, dict) else Rule(None, _values(entry), entry.place),), entry.place)

    @property
    def constant(self) -> bool:
        """Whether the value is the same for every tensor."""
        return self.rules[0].filter is None and len(self.rules[0].values) == 1

    @property
    def scheduled(self) -> bool:
        """Whether a rule is a layer schedule."""
        return any(len(rule.values) > 1 for rule in self.rules)

    def rule(self, name: str) -> Rule | None:
        """Return the first rule that matches the tensor of that name; None if none matches."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def at(self, name: str, t: float) -> Value | None:
        """Return the value for a tensor; None if no filter matches.

        Args:
            name: Name of the tensor.
            t: Depth of its layer in the slice, 0 to 1. Numbers of a schedule are interpolated linearly; of flags and
                strings, one entry is chosen.
        """
        rule = self.rule(name)
        return None if rule is None else evaluate(rule.values, t)


def evaluate(values: tuple[Value, ...], t: float, *, pick: bool = False) -> Value:
    """Return the value of a layer schedule at depth `t`, 0 to 1.

    Args:
        values: The schedule; a single value applies at every depth.
        t: Depth.
        pick: Choose one entry instead of interpolating between two.
    """
    position = t * (len(values) - 1)
    # i / (n - 1) * (n - 1) may be rounded to slightly less than i
    low = int(position + 1e-9)
    first = values[low]
    share = position - low
    if pick or share <= 0 or isinstance(first, str | bool):
        return first
    second = values[low + 1]
    if isinstance(second, str | bool):
        return first
    return first + share * (second - first)


def _rule(entry: Entry) -> Rule:
    if not isinstance(entry.value, dict):
        raise entry.error(f"a list of {{filter, value}} holds nothing else, got {shown(entry.value)}")
    fields = entry.mapping(("filter", "value"), required=["value"])
    pattern = fields["filter"].text() if "filter" in fields else None
    return Rule(None if pattern == "*" else pattern, _values(fields["value"]), fields["value"].place)


def _values(entry: Entry) -> tuple[Value, ...]:
    if isinstance(entry.value, list):
        return tuple(_value(item) for item in entry.items())
    return (_value(entry),)


def _value(entry: Entry) -> Value:
    if entry.value is None or isinstance(entry.value, list | dict):
        raise entry.error(f"expected a number, flag or text, got {shown(entry.value)}")
    if isinstance(entry.value, str) and len(entry.value) > _MAX_TEXT:
        raise entry.error(f"a value of {len(entry.value)} characters; {_MAX_TEXT} are allowed")
    return entry.value
