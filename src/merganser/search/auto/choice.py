"""What `auto` found: the recipes that were tried, the proof, and what to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ends import Difference, End, best_single, difference, to_json
from ..judge import Verdict
from ..objectives import Objective
from ..trials import Trial


@dataclass(frozen=True)
class Tried:
    """A recipe that was tried.

    Args:
        name: Name of its recipe file.
        recipe: The recipe, as YAML.
        verdict: What it was worth; None if it failed.
        failed: Why it has no figure.
        seconds: How long it took.
    """

    name: str
    recipe: str
    verdict: Verdict | None
    failed: str | None
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether it was scored on all items of trials."""
        return self.verdict is not None and not self.verdict.stopped


@dataclass(frozen=True)
class Choice:
    """What was made of the models.

    Args:
        folder: The folder.
        objective: What was improved.
        domains: The best model of each task whose gain over the base counts.
        tried: The recipes of the portfolio.
        around: Trials around the best of them.
        ends: The winner, the models and the average, on items that nothing was chosen on.
        held_out: Number of these items.
        recommended: Name of what to use: "winner", a model, or "average".
        merged: Folder of the merge; None where it is not recommended.
        notes: What the user should know.
    """

    folder: Path
    objective: Objective
    domains: Mapping[str, str]
    tried: tuple[Tried, ...]
    around: tuple[Trial, ...]
    ends: tuple[End, ...]
    held_out: int
    recommended: str
    merged: Path | None
    notes: tuple[str, ...]

    @property
    def against(self) -> list[tuple[End, Difference]]:
        """The best single model and the average, each with how much better the winner is."""
        return _against(self.ends, self.objective)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: format 1 of docs/search.md."""
        return {
            "kind": "auto result",
            "format": 1,
            "objective": self.objective.text,
            "domains": dict(self.domains),
            "tried": [
                {
                    "name": tried.name,
                    "value": None if tried.verdict is None else tried.verdict.values[0],
                    "items": 0 if tried.verdict is None else tried.verdict.items,
                    "stopped": tried.verdict is not None and tried.verdict.stopped,
                    "failed": tried.failed,
                    "seconds": tried.seconds,
                }
                for tried in self.tried
            ],
            "around": [
                {"name": t.name, "value": t.values and t.values[0], "items": t.items, "stopped": t.stopped}
                for t in self.around
            ],
            "held_out": self.held_out,
            "ends": to_json(self.ends, [self.objective]),
            "recommended": self.recommended,
            "merged": None if self.merged is None else str(self.merged),
            "notes": list(self.notes),
        }


def _against(ends: Sequence[End], objective: Objective) -> list[tuple[End, Difference]]:
    winner = next(end for end in ends if end.role == "winner")
    others = [best_single(ends, objective), next((end for end in ends if end.role == "average"), None)]
    return [
        (end, difference(winner.values[0], end.values[0], objective))
        for end in others
        if end is not None and end.values and winner.values
    ]


def recommend(ends: Sequence[End], objective: Objective) -> str:
    """Return the name of what to use: the winner, unless it is worse than another beyond the interval.

    Args:
        ends: The winner, the models and the average, on items that nothing was chosen on.
        objective: What was improved.
    """
    worse = [(gap.value, end.name) for end, gap in _against(ends, objective) if gap.interval and gap.interval[1] < 0]
    return min(worse)[1] if worse else "winner"
