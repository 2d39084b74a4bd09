"""What a search found: trials, front, and the held-out test; and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_whole
from .difference import Difference
from .ends import End, best_single, difference, to_json
from .folder import Folder
from .scoring.objectives import Objective
from .stored import FORMAT, KIND
from .trials import Trial, Trials


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        folder: The folder of the search.
        objectives: What was improved.
        trials: All trials.
        front: The best trial, or with several objectives those that none beats in all.
        ends: Winners, inputs and average on the items held out; empty if the search was stopped before.
        held_out: Number of items held out; 0 where a command judges.
        sampler: The sampler.
        importance: For each objective, which share of its variation each value explains, as far as it is known.
        notes: What the user should know.
    """

    folder: Path
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    ends: tuple[End, ...]
    held_out: int
    sampler: str
    importance: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    @property
    def best(self) -> Trial | None:
        """The first of the front; None if no trial keeps the bounds."""
        return self.front[0] if self.front else None

    @property
    def against(self) -> list[tuple[End, Difference]]:
        """The best single model and the average, each with how much better the winner is in the first objective."""
        winner = next((end for end in self.ends if end.role == "winner" and end.values), None)
        if winner is None or not winner.values:
            return []
        average = next((end for end in self.ends if end.role == "average"), None)
        others = (best_single(self.ends, self.objectives[0]), average)
        return [
            (end, difference(winner.values[0], end.values[0], self.objectives[0]))
            for end in others
            if end is not None and end.values
        ]

    def recipe_file(self, trial: Trial) -> Path:
        """Return the plain recipe of a trial."""
        return self.folder / "recipes" / f"{trial.name}.yaml"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data: format 1 of docs/search.md."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "objectives": [{"objective": o.text, "direction": o.direction} for o in self.objectives],
            "sampler": self.sampler,
            "trials": [trial.to_json() for trial in self.trials],
            "front": [trial.number for trial in self.front],
            "held_out": self.held_out,
            "ends": to_json(self.ends, self.objectives),
            "importance": {name: dict(shares) for name, shares in self.importance.items()},
            "notes": list(self.notes),
        }


def write_found(
    running: Trials, ends: Sequence[End], held_out: int, notes: Sequence[str], folder: Folder, sampler: str
) -> Found:
    """Return what is known so far, and write it.

    Args:
        running: The trials.
        ends: Winners, inputs and average on the items held out; none before the held-out test.
        held_out: Number of items held out.
        notes: What the user should know.
        folder: Where it is written.
        sampler: The sampler.
    """
    objectives = tuple(running.objectives)
    best = running.best
    front = running.front if len(objectives) > 1 else [] if best is None else [best]
    found = Found(
        folder=folder.path,
        objectives=objectives,
        trials=tuple(running.over),
        front=tuple(front),
        ends=tuple(ends),
        held_out=held_out,
        sampler=sampler,
        importance=running.importance,
        notes=tuple(notes),
    )
    write_whole(folder.result, json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
    if best is not None and len(objectives) == 1 and best.values:
        about = f"# found by merganser search: trial {best.number + 1} of {len(found.trials)}, {objectives[0].text} "
        write_whole(folder.winner, f"{about}{best.values[0]:.6g} on the items of the trials\n{best.recipe}")
    return found
