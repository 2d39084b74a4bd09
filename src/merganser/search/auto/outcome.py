"""What `auto` found: the recipes that were tried, the proof, and what to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ends import Difference, End, best_single, difference, to_json
from ..judge import Verdict
from ..objectives import Figures, Objective
from ..trials import Trial

_MUCH = 0.5
"""Share of the gain of its worst task that a merge must keep, or a sidecar is mentioned."""

KIND = "auto result"
FORMAT = 1


@dataclass(frozen=True)
class Tried:
    """A recipe that was tried.

    Args:
        name: Name of its recipe file.
        recipe: The recipe, as YAML.
        verdict: What it was worth; None if it failed.
        failed: Why it has no figure.
        seconds: How long it took, in an earlier call if it was tried there.
        figures: What it keeps and forgets on the items that it was scored on, by the names of objectives.
    """

    name: str
    recipe: str
    verdict: Verdict | None
    failed: str | None
    seconds: float
    figures: Figures = field(default_factory=dict)

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
        kept: What each of them keeps and forgets there, by its name and the names of objectives.
        held_out: Number of these items.
        winner: Name of the recipe that was the best on the items of trials.
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
    kept: Mapping[str, Figures]
    held_out: int
    winner: str
    recommended: str
    merged: Path | None
    notes: tuple[str, ...]

    @property
    def against(self) -> list[tuple[End, Difference]]:
        """The best single model and the average, each with how much better the winner is."""
        return _against(self.ends, self.objective)

    @property
    def advice(self) -> str | None:
        """What else would help where a merge of all models loses much; None where it does not."""
        worst = self.kept.get("winner", {}).get("recovered/worst")
        if self.recommended == "winner" and (worst is None or worst.value >= _MUCH):
            return None
        lost = (
            "no merge that was tried is better"
            if worst is None
            else f"of its worst task the merge keeps {worst.value:.0%}"
        )
        return (
            f"{lost[0].upper()}{lost[1:]}. If it is known which task a text is of when the model is used, a merge with a sidecar "
            "gives each model back: merge_method: skillpack, and merganser restore"
        )

    @property
    def chosen_from(self) -> int:
        """Number of recipes that were scored, of which the winner is the best."""
        around = sum(trial.same_as is None and trial.failed is None for trial in self.around)
        return around + sum(tried.verdict is not None for tried in self.tried)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: format 1 of docs/auto.md."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "objective": self.objective.text,
            "domains": dict(self.domains),
            "tried": [
                {
                    "name": tried.name,
                    "value": None if tried.verdict is None else tried.verdict.values[0],
                    "figures": _figures(tried.figures),
                    "items": 0 if tried.verdict is None else tried.verdict.items,
                    "stopped": tried.verdict is not None and tried.verdict.stopped,
                    "failed": tried.failed,
                    "seconds": tried.seconds,
                }
                for tried in self.tried
            ],
            "around": [trial.to_json() for trial in self.around],
            "winner": self.winner,
            "chosen_from": self.chosen_from,
            "held_out": self.held_out,
            "kept": {name: _figures(figures) for name, figures in self.kept.items()},
            "advice": self.advice,
            "ends": to_json(self.ends, [self.objective]),
            "recommended": self.recommended,
            "merged": None if self.merged is None else str(self.merged),
            "notes": list(self.notes),
        }


def _figures(figures: Figures) -> dict[str, dict[str, Any]]:
    """Return what is kept and forgotten, on the whole, at worst and of each task, as plain data."""
    found: dict[str, dict[str, Any]] = {}
    for name, figure in figures.items():
        group, _, rest = name.partition("/")
        if group in ("recovered", "forgotten"):
            found.setdefault(group, {})[rest] = {"value": figure.value, "stderr": figure.stderr}
    return found


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
