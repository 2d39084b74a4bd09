"""What `auto` measured, what follows from it, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ends import End, best_single, difference, to_json
from ..scoring.judge import Verdict
from ..scoring.objectives import Figures, Objective
from ..trials import Progress, Trial
from .choice import FORMAT, KIND

__all__ = ["Above", "Tried", "plain", "recommend"]

_MUCH = 0.5
"""Share of the gain of its worst task that a merge must keep, or a sidecar is mentioned."""


@dataclass(frozen=True)
class Tried:
    """A recipe that was tried.

    Args:
        name: Name of its recipe file.
        recipe: The recipe, as YAML.
        verdict: Its score; None if it failed.
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


class Above:
    """A `Progress` of trials around a recipe: none of them is the best so far before it is better than the recipes were.

    Args:
        inner: Receives the progress.
        least: What the best recipe was worth.
    """

    def __init__(self, inner: Progress, least: float) -> None:
        self._inner, self._least = inner, least

    def begin(self, trial: int, of: int | None) -> None:
        """Pass it on."""
        self._inner.begin(trial, of)

    def over(self, trial: Trial, best: Trial | None) -> None:
        """Pass it on; without a best one that is none."""
        better = best is not None and best.values is not None and best.values[0] > self._least
        self._inner.over(trial, best if better else None)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._inner.note(text)

    def measuring(self, model: str) -> None:
        """Pass it on."""
        self._inner.measuring(model)

    def testing(self, model: str) -> None:
        """Pass it on."""
        self._inner.testing(model)


def plain(
    objective: Objective,
    domains: Mapping[str, str],
    tried: Sequence[Tried],
    around: Sequence[Trial],
    ends: Sequence[End],
    kept: Mapping[str, Figures],
    *,
    held_out: int,
    winner: str,
    recommended: str,
    merged: Path | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Return what was found as plain data: format 1 of docs/auto.md, which `read_choice` reads.

    Args:
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
    scored = sum(trial.same_as is None and trial.failed is None for trial in around)
    return {
        "kind": KIND,
        "format": FORMAT,
        "objective": objective.text,
        "domains": dict(domains),
        "tried": [
            {
                "name": each.name,
                "value": None if each.verdict is None else each.verdict.values[0],
                "figures": _figures(each.figures),
                "items": 0 if each.verdict is None else each.verdict.items,
                "stopped": each.verdict is not None and each.verdict.stopped,
                "failed": each.failed,
                "seconds": each.seconds,
            }
            for each in tried
        ],
        "around": [trial.to_json() for trial in around],
        "winner": winner,
        "chosen_from": scored + sum(each.verdict is not None for each in tried),
        "held_out": held_out,
        "kept": {name: _figures(figures) for name, figures in kept.items()},
        "advice": _advice(recommended, kept),
        "ends": to_json(ends, [objective]),
        "recommended": recommended,
        "merged": None if merged is None else str(merged),
        "notes": list(notes),
    }


def _advice(recommended: str, kept: Mapping[str, Figures]) -> str | None:
    """Return what else would help where a merge of all models loses much; None where it does not."""
    worst = kept.get("winner", {}).get("recovered/worst")
    if recommended == "winner" and (worst is None or worst.value >= _MUCH):
        return None
    lost = (
        "no merge that was tried is better" if worst is None else f"of its worst task the merge keeps {worst.value:.0%}"
    )
    return (
        f"{lost[0].upper()}{lost[1:]}. If the task of a text is known when the model is used, a merge with a sidecar "
        "gives each model back: merge_method: skillpack, and merganser restore"
    )


def _figures(figures: Figures) -> dict[str, dict[str, Any]]:
    """Return what is kept and forgotten, on the whole, at worst and of each task, as plain data."""
    found: dict[str, dict[str, Any]] = {}
    for name, figure in figures.items():
        group, _, rest = name.partition("/")
        if group in ("recovered", "forgotten"):
            found.setdefault(group, {})[rest] = {"value": figure.value, "stderr": figure.stderr}
    return found


def recommend(ends: Sequence[End], objective: Objective) -> str:
    """Return the name of what to use: the winner, unless it is worse than another beyond the interval.

    Args:
        ends: The winner, the models and the average, on items that nothing was chosen on.
        objective: What was improved.
    """
    winner = next(end for end in ends if end.role == "winner")
    if not winner.values:
        return "winner"
    worse = []
    for end in (best_single(ends, objective), next((end for end in ends if end.role == "average"), None)):
        if end is not None and end.values:
            gap = difference(winner.values[0], end.values[0], objective)
            if gap.interval and gap.interval[1] < 0:
                worse.append((gap.value, end.name))
    return min(worse)[1] if worse else "winner"
