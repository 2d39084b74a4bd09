"""A control variate for a ratio of sums, item by item, in plain float64."""

from __future__ import annotations

from collections.abc import Sequence

Pairs = Sequence[tuple[float, float]]
"""Numerator and denominator of each item."""


def ratio(pairs: Pairs) -> float:
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


def residuals(pairs: Pairs) -> list[float]:
    total, value = sum(b for _, b in pairs), ratio(pairs)
    return [(a - value * b) / total for a, b in pairs]


def estimate(own: Pairs, controls: Sequence[Pairs], controls_on_all: Sequence[Pairs]) -> float:
    """The ratio of `own`, corrected by the mean of the ratios of the controls, with the fitted coefficient."""
    count = len(controls)
    seen = sum(ratio(each) for each in controls) / count
    whole = sum(ratio(each) for each in controls_on_all) / count
    x = [sum(values) / count for values in zip(*(residuals(each) for each in controls), strict=True)]
    y = residuals(own)
    beta = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    return ratio(own) - beta * (seen - whole)
