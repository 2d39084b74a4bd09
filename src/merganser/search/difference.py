"""How much better the winner is than another model, and the sentence that says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Difference"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The winner minus another model, where above 0 is better.

    Args:
        value: The difference.
        interval: The ends of its interval of 95 %, by Student's t; None where there is no standard error.
    """

    value: float
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"value": self.value, "interval": None if self.interval is None else [*self.interval]}

    def sentence(self, name: str, role: str) -> str:
        """Return what it says of the winner, in words.

        Args:
            name: Name of the other model.
            role: "average", or "input" of the best single model.
        """
        other = "the average" if role == "average" else f"{name}, the best single model"
        if self.interval is None:
            said = "better than" if self.value > 0 else "worse than" if self.value < 0 else "as good as"
            return f"{said} {other}; each has one figure, so there is no interval"
        if self.interval[0] > 0:
            return f"significantly better than {other} (95 % interval)"
        if self.interval[1] < 0:
            return f"significantly worse than {other} (95 % interval): take that instead"
        return f"no significant difference from {other}: the 95 % interval contains zero"
