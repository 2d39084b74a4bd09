"""Measured numbers with standard errors over the items (documents, questions) that they were measured on.

Every number of an evaluation is a ratio of sums over items (bits over bytes, right answers over questions), or is
computed from several such ratios. An estimate holds its value and what each item contributes to the value's deviation
(the linearisation of the delta method, also known as the infinitesimal jackknife). Arithmetic on estimates adds and
scales these contributions item by item. What two models have in common on the same items therefore cancels: differences
and ratios are paired automatically. Numbers from different items count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number with the contributions of items to its deviation.

    Args:
        value: The number.
        parts: For each set of items, the contribution of each item, float64, shape [n]. Estimates that share a key were
            measured on the same items, in the same order; different keys are independent.
    """

    value: float
    parts: Mapping[Hashable, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_ratio(cls, numerator: ArrayLike, denominator: ArrayLike, items: Hashable) -> Estimate:
        """Return the ratio of two sums over items.

        Args:
            numerator: Numerator of each item.
            denominator: Denominator of each item; the sum must be above 0.
            items: Key of the set of items.
        """
        above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
        total = below.sum()
        value = above.sum() / total
        return cls(float(value), {items: (above - value * below) / total})

    @classmethod
    def of_error(cls, value: float, stderr: float, key: Hashable) -> Estimate:
        """Return an estimate from a value and its standard error, without contributions of items."""
        # two made-up items with these contributions have exactly this standard error
        return cls(value, {key: np.array([stderr / 2, -stderr / 2])})

    @property
    def stderr(self) -> float | None:
        """Standard error, with Bessel's correction for each set of items; None if a set has only one item."""
        total = 0.0
        for part in self.parts.values():
            if len(part) < 2:
                return None
            total += float(part @ part) * len(part) / (len(part) - 1)
        return math.sqrt(total)

    @property
    def degrees_of_freedom(self) -> float:
        """Degrees of freedom of the standard error (Welch-Satterthwaite): n - 1 for one set of n items; infinite without an error.

        An interval of few items must be as wide as Student's t with these says, and not as the normal distribution says.
        """
        variances = [
            (float(part @ part) * len(part) / (len(part) - 1), len(part))
            for part in self.parts.values()
            if len(part) > 1
        ]
        total = sum(variance for variance, _ in variances)
        if total <= 0:
            return math.inf
        return total**2 / sum(variance**2 / (count - 1) for variance, count in variances)

    def __add__(self, other: Estimate) -> Estimate:
        return self._with(other, self.value + other.value, 1.0, 1.0)

    def __sub__(self, other: Estimate) -> Estimate:
        return self._with(other, self.value - other.value, 1.0, -1.0)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, {key: part * factor for key, part in self.parts.items()})

    def __truediv__(self, other: Estimate) -> Estimate:
        value = self.value / other.value
        return self._with(other, value, 1 / other.value, -value / other.value)

    def _with(self, other: Estimate, value: float, mine: float, theirs: float) -> Estimate:
        parts = {key: part * mine for key, part in self.parts.items()}
        for key, part in other.parts.items():
            parts[key] = parts[key] + part * theirs if key in parts else part * theirs
        return Estimate(value, parts)

    def to_json(self) -> dict[str, float | None]:
        """Return value and standard error."""
        return {"value": self.value, "stderr": self.stderr}


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of at least one estimate."""
    total = estimates[0]
    for other in estimates[1:]:
        total = total + other
    return total * (1 / len(estimates))


def smallest(estimates: Mapping[str, Estimate]) -> tuple[str, float, float | None]:
    """Return the smallest of at least one estimate.

    The minimum of several noisy numbers is biased downwards, and its standard error is not that of any of them. It is
    computed as the standard deviation of the minimum of independent normal variables with these means and standard
    errors, from 10,000 evenly spaced quantiles of each, combined in a fixed pseudo-random order.

    Returns:
        Its name, its value and the standard error; None as standard error if one of them has none.
    """
    name = min(estimates, key=lambda key: estimates[key].value)
    errors = [estimate.stderr for estimate in estimates.values()]
    if any(error is None for error in errors):
        return name, estimates[name].value, None
    normal = [NormalDist().inv_cdf((i + 0.5) / _DRAWS) for i in range(_DRAWS)]
    order = np.random.default_rng(0)
    drawn = [estimate.value + order.permutation(normal) * (estimate.stderr or 0.0) for estimate in estimates.values()]
    return name, estimates[name].value, float(np.min(drawn, axis=0).std())
