"""What `auto` found, as its `result.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import CheckpointError
from ...jsonfile import Entry
from ...wording import plural
from ..stored import StoredEnd, StoredStudy, StoredTrial, open_result, read_end, read_trial

__all__ = ["FIGURES", "FORMAT", "KIND", "Choice", "TriedRecipe", "read_choice"]

KIND = "auto result"
FORMAT = 1

FIGURES = {"recovered/mean": "kept, mean", "recovered/worst": "kept, worst task", "forgotten/mean": "forgotten"}
"""What is shown of a model, by the names of objectives, and what it is called."""

Figure = tuple[float, float | None]
"""A value and its standard error."""


@dataclass(frozen=True, slots=True)
class TriedRecipe:
    """A recipe of the portfolio.

    Args:
        name: Name of its recipe file.
        value: The objective, as it was compared; None if it failed.
        figures: What it keeps and forgets on the items that it was scored on.
        items: Number of these items.
        stopped: Whether it was ended early.
        failed: Why it has no figures.
        seconds: How long it took.
    """

    name: str
    value: float | None
    figures: Mapping[str, Figure]
    items: int
    stopped: bool
    failed: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` found.

    Args:
        folder: The folder.
        objective: What was improved.
        domains: The best model of each task whose gain over the base counts.
        tried: The recipes of the portfolio.
        around: Trials around the best of them.
        ends: The winner, the models and the average, on items that nothing was chosen on.
        kept: What each of them keeps and forgets there, by its name and the names of objectives.
        held_out: Number of items of the held-out test.
        winner: Name of the recipe that was the best on the items of trials.
        chosen_from: Number of recipes that were scored.
        recommended: Name of what to use: "winner", a model, or "average".
        merged: Folder of the merge; None where it is not recommended.
        advice: What else would help; None if nothing.
        notes: What the user should know.
    """

    folder: Path
    objective: str
    domains: Mapping[str, str]
    tried: tuple[TriedRecipe, ...]
    around: tuple[StoredTrial, ...]
    ends: tuple[StoredEnd, ...]
    kept: Mapping[str, Mapping[str, Figure]]
    held_out: int
    winner: str
    chosen_from: int
    recommended: str
    merged: Path | None
    advice: str | None
    notes: tuple[str, ...]

    @property
    def what_was_tried(self) -> str:
        """How many recipes and trials there were, in words."""
        around = f" and {plural(len(self.around), 'trial')} around the best of them" if self.around else ""
        return f"{plural(len(self.tried), 'recipe')}{around}"

    @property
    def what_to_use(self) -> str:
        """The model that is recommended, in words."""
        if self.merged is not None:
            return f"the merge in {self.folder / 'merged'}"
        return "the average (recipes/average.yaml)" if self.recommended == "average" else f"{self.recommended} as it is"

    @property
    def domains_text(self) -> str:
        """The tasks that count, each with its best model."""
        return ", ".join(f"{task} ({name})" for task, name in self.domains.items())

    @property
    def study(self) -> StoredStudy:
        """The portfolio and the trials around its best as one search, in the order in which they were made."""
        listed = [
            StoredTrial(
                number=i,
                name=tried.name,
                settings={},
                values=None if tried.value is None else (tried.value,),
                stderr=(tried.figures.get(self.objective, (0.0, None))[1],),
                feasible=True,
                items=tried.items,
                stopped=tried.stopped,
                same_as=None,
                failed=tried.failed,
                seconds=tried.seconds,
            )
            for i, tried in enumerate(self.tried)
        ]
        first = len(listed)
        listed += [
            replace(t, number=first + t.number, same_as=None if t.same_as is None else first + t.same_as)
            for t in self.around
        ]
        front = tuple(trial.number for trial in listed if trial.name == self.winner)
        objectives = ((self.objective, "maximize"),)
        return StoredStudy(
            folder=self.folder,
            objectives=objectives,
            sampler="auto",
            trials=tuple(listed),
            front=front,
            held_out=self.held_out,
            ends=self.ends,
            importance={},
            notes=self.notes,
        )


def read_choice(folder: Path) -> Choice:
    """Read what `auto` found.

    Args:
        folder: Its folder.

    Raises:
        NotFoundError: It found nothing yet.
        CheckpointError: The file is damaged.
        UnsupportedError: It is of a later version, or of a search.
    """
    root = open_result(folder, KIND, FORMAT, "merganser auto")
    merged, advice = root.get("merged"), root.get("advice")
    around = tuple(root["around"].each(read_trial))
    for trial in around:
        if trial.values is not None and len(trial.values) != 1:
            raise CheckpointError(
                f"{root.where}: trial {trial.number} has {len(trial.values)} values for one objective"
            )
    return Choice(
        folder=folder,
        objective=root["objective"].text(),
        domains={task: name.text() for task, name in root["domains"].items()},
        tried=tuple(root["tried"].each(_tried)),
        around=around,
        ends=tuple(root["ends"].each(read_end)),
        kept={name: _figures(entry) for name, entry in root["kept"].items()},
        held_out=root["held_out"].whole(),
        winner=root["winner"].text(),
        chosen_from=root["chosen_from"].whole(),
        recommended=root["recommended"].text(),
        merged=None if merged is None else Path(merged.text()),
        advice=None if advice is None else advice.text(),
        notes=tuple(root["notes"].each(Entry.text)),
    )


def _tried(entry: Entry) -> TriedRecipe:
    value, failed = entry.get("value"), entry.get("failed")
    return TriedRecipe(
        name=entry["name"].text(),
        value=None if value is None else value.number(),
        figures=_figures(entry["figures"]),
        items=entry["items"].whole(),
        stopped=entry["stopped"].flag(),
        failed=None if failed is None else failed.text(),
        seconds=entry["seconds"].number(),
    )


def _figures(entry: Entry) -> dict[str, Figure]:
    found = {}
    for group, own in entry.items():
        for name, figure in own.items():
            stderr = figure.get("stderr")
            found[f"{group}/{name}"] = (figure["value"].number(), None if stderr is None else stderr.number())
    return found
