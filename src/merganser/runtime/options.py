"""Checks of the options of caches and token mergers."""

from __future__ import annotations

import math
from fractions import Fraction

from ..errors import ParameterError

__all__ = ["at_least", "exact", "in_range", "part"]


def part(count: int, share: float | Fraction, *, up: bool = False) -> int:
    """Return a share of a number, rounded down, or up.

    The share is what it reads as: 0.07 of 100 is 7, though the product of floating-point numbers is above 7, and 0.29 of 100
    is 29, though it is below.
    """
    found = (share if isinstance(share, Fraction) else exact(share)) * count
    return math.ceil(found) if up else math.floor(found)


def exact(share: float) -> Fraction:
    """Return a share as it reads: 0.07 is 7 / 100."""
    return Fraction(str(float(share)))


def at_least(name: str, value: object, least: int) -> int:
    """Return a whole number that is not too small.

    Raises:
        ParameterError: It is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ParameterError(f"{name}: must be a whole number of at least {least}, not {value!r}")
    return value


def in_range(name: str, value: object, low: float, high: float, *, above: bool = False, what: str = "share") -> float:
    """Return a number from `low` to `high`.

    Args:
        name: The option's name.
        value: What was given.
        low: The least.
        high: The most.
        above: Whether `low` itself is too small.
        what: What the number is, for the message.

    Raises:
        ParameterError: It is something else.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        limits = f"above {low} and up to {high}" if above else f"from {low} to {high}"
        raise ParameterError(f"{name}: must be a {what} {limits}, not {value!r}")
    assert isinstance(value, (int, float))
    return value
