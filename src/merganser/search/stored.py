"""Read a search back from its folder: `result.json`, and the table of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, NotFoundError, UnsupportedError
from ..evaluation.scoring.journal import read_journal
from ..jsonfile import Entry, os_reason, read_object
from .difference import Difference

__all__ = [
    "FORMAT",
    "KIND",
    "StoredEnd",
    "StoredItems",
    "StoredStudy",
    "StoredTrial",
    "is_study",
    "open_result",
    "read_end",
    "read_items",
    "read_study",
    "read_trial",
    "result_kind",
]

KIND = "search result"
FORMAT = 1
RESULT = "result.json"
ITEMS = "items.jsonl"
SETTINGS = "search.json"


@dataclass(frozen=True, slots=True)
class StoredTrial:
    """A trial.

    Args:
        number: Its number, from 0.
        name: Name of its recipe file.
        settings: The values that were tried, as plain data, by where they stand in the recipe.
        values: The objectives; None if it failed.
        stderr: Standard error of each objective, None if it has none; fewer than objectives where they are not known.
        feasible: Whether it keeps all bounds.
        items: Number of items that it was scored on.
        stopped: Whether it was ended early.
        same_as: Number of an earlier trial with the same recipe.
        failed: Why it has no values.
        seconds: How long it took.
    """

    number: int
    name: str
    settings: Mapping[str, object]
    values: tuple[float, ...] | None
    stderr: tuple[float | None, ...]
    feasible: bool
    items: int
    stopped: bool
    same_as: int | None
    failed: str | None
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether it may win."""
        return self.values is not None and not self.stopped and self.feasible


@dataclass(frozen=True, slots=True)
class StoredEnd:
    """A model, measured on the items held out.

    Args:
        name: Its name.
        role: "winner", "input", "average".
        values: Value and standard error of each objective; None if it failed.
        better: For each objective how much better the winner is; None of the winner itself.
        failed: Why it has no values.
    """

    name: str
    role: str
    values: tuple[tuple[float, float | None], ...] | None
    better: tuple[Difference, ...] | None
    failed: str | None


@dataclass(frozen=True, slots=True)
class StoredStudy:
    """What a search found.

    Args:
        folder: The folder.
        objectives: Name and direction ("maximize", "minimize") of each objective.
        sampler: The sampler.
        trials: The trials, by number.
        front: Numbers of the best trials.
        held_out: Number of items held out.
        ends: Measurements on them; none if the search was stopped before.
        importance: For each objective the share of its variation that each value explains; empty where it is not known.
        notes: What the user should know.
    """

    folder: Path
    objectives: tuple[tuple[str, str], ...]
    sampler: str
    trials: tuple[StoredTrial, ...]
    front: tuple[int, ...]
    held_out: int
    ends: tuple[StoredEnd, ...]
    importance: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    @property
    def against(self) -> list[tuple[StoredEnd, Difference]]:
        """The best single model and the average, each with how much better the winner is in the first objective."""
        sign = 1.0 if self.objectives[0][1] == "maximize" else -1.0
        inputs = [(sign * end.values[0][0], end) for end in self.ends if end.role == "input" and end.values]
        single = max(inputs, key=lambda each: each[0])[1] if inputs else None
        average = next((end for end in self.ends if end.role == "average"), None)
        return [(end, end.better[0]) for end in (single, average) if end is not None and end.better]


@dataclass(frozen=True, slots=True)
class StoredItems:
    """What models scored on the items of a task that trials were chosen with.

    Args:
        task: The task.
        score: What a score is: "correct" (1 or 0), or "bits per byte", of which the negative is kept, so that higher is better;
            of a task of lm-eval its main metric: its value, or of likelihoods the logarithm.
        models: Names of the models.
        items: Number of each item in its task.
        scores: Scores, float64, shape [models, items]; NaN where a model was not scored.
    """

    task: str
    score: str
    models: tuple[str, ...]
    items: tuple[int, ...]
    scores: NDArray[np.float64]


def is_study(folder: Path) -> bool:
    """Return whether a folder is that of a search."""
    return (folder / SETTINGS).is_file()


def result_kind(folder: Path) -> str:
    """Return the kind of what was found in the folder of a search; for the errors see `open_result`."""
    return _read_result(folder)["kind"].text()


def open_result(folder: Path, kind: str, latest: int, command: str) -> Entry:
    """Return the content of `result.json`.

    Args:
        folder: The folder of the search.
        kind: What it must be.
        latest: The latest format that is known.
        command: The command that writes it.

    Raises:
        NotFoundError: There is none.
        CheckpointError: It is damaged.
        UnsupportedError: It is of another kind, or of a later version.
    """
    root = _read_result(folder)
    found = root["kind"].text()
    if found != kind:
        raise UnsupportedError(f"{root.where}: is of the kind {found!r}; {command} writes {kind!r}")
    if root["format"].whole() > latest:
        raise UnsupportedError(f"{root.where}: is of a later version of merganser (format {root['format'].whole()})")
    return root


def _read_result(folder: Path) -> Entry:
    file = folder / RESULT
    if not file.exists():
        raise NotFoundError(f"{file}: no such file; the search in {folder} was stopped before it found something")
    return Entry(read_object(file), str(file))


def read_study(folder: Path) -> StoredStudy:
    """Read what a search found.

    Args:
        folder: The folder of the search.

    Raises:
        NotFoundError: It found nothing yet.
        CheckpointError: The file is damaged.
        UnsupportedError: It is of a later version, or of `merganser auto`.
    """
    root, file = open_result(folder, KIND, FORMAT, "merganser search"), folder / RESULT
    objectives = tuple(root["objectives"].each(lambda e: (e["objective"].text(), e["direction"].text())))
    trials = tuple(root["trials"].each(read_trial))
    for trial in trials:
        if trial.values is not None and len(trial.values) != len(objectives):
            raise CheckpointError(
                f"{file}: trial {trial.number} has {len(trial.values)} values for {len(objectives)} objectives"
            )
    front = tuple(root["front"].each(Entry.whole))
    unknown = set(front) - {trial.number for trial in trials}
    if unknown:
        raise CheckpointError(f"{file}: front: there is no trial {min(unknown)}")
    importance = root.get("importance")
    return StoredStudy(
        folder=folder,
        objectives=objectives,
        sampler=root["sampler"].text(),
        trials=trials,
        front=front,
        held_out=root["held_out"].whole(),
        ends=tuple(root["ends"].each(read_end)),
        importance={}
        if importance is None
        else {name: {k: v.number() for k, v in e.items()} for name, e in importance.items()},
        notes=tuple(root["notes"].each(Entry.text)),
    )


def read_trial(entry: Entry) -> StoredTrial:
    """Return a trial from its plain data."""
    values, same_as, failed = entry.get("values"), entry.get("same_as"), entry.get("failed")
    return StoredTrial(
        number=entry["number"].whole(),
        name=entry["recipe"].text(),
        settings={name: value.plain() for name, value in entry["settings"].items()},
        values=None if values is None else tuple(values.each(Entry.number)),
        stderr=tuple(entry["stderr"].each(Entry.maybe)),
        feasible=entry["feasible"].flag(),
        items=entry["items"].whole(),
        stopped=entry["stopped"].flag(),
        same_as=None if same_as is None else same_as.whole(),
        failed=None if failed is None else failed.text(),
        seconds=entry["seconds"].number(),
    )


def read_end(entry: Entry) -> StoredEnd:
    """Return a measurement on items held out from its plain data."""
    values, better, failed = entry.get("values"), entry.get("winner_better_by"), entry.get("failed")
    return StoredEnd(
        entry["name"].text(),
        entry["role"].text(),
        None if values is None else tuple(values.each(_measured)),
        None if better is None else tuple(better.each(_better)),
        None if failed is None else failed.text(),
    )


def _measured(entry: Entry) -> tuple[float, float | None]:
    stderr = entry.get("stderr")
    return entry["value"].number(), None if stderr is None else stderr.number()


def _better(entry: Entry) -> Difference:
    interval = entry.get("interval")
    if interval is None:
        return Difference(entry["value"].number(), None)
    ends = interval.each(Entry.number)
    if len(ends) != 2:
        interval.refuse("two numbers")
    return Difference(entry["value"].number(), (ends[0], ends[1]))


def read_items(folder: Path) -> list[StoredItems]:
    """Read what models scored on the items of trials, by task; nothing where a command judged.

    Args:
        folder: The folder of the search.

    Raises:
        CheckpointError: The table cannot be read.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    kinds: dict[str, str] = {}
    file = folder / ITEMS
    try:
        entries = read_journal(file) if file.exists() else []
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    for entry in entries:
        task, model, content = entry.get("task"), entry.get("model"), entry.get("content", {})
        if task is None or model is None or entry.get("batch", -1) < 0 or "columns" not in content:
            continue
        columns = content["columns"]
        if "bits" in columns and "bytes" in columns:
            kinds[task] = "bits per byte"
            scores = [-bits / max(size, 1) for bits, size in zip(columns["bits"], columns["bytes"], strict=True)]
        elif "correct" in columns:
            kinds[task], scores = "correct", [float(value) for value in columns["correct"]]
        elif (metric := str(entry.get("metric"))) in columns:
            weights = columns.get(f"{metric} weight", [1.0] * len(columns[metric]))
            kinds[task] = metric
            scores = [value / max(weight, 1.0) for value, weight in zip(columns[metric], weights, strict=True)]
        else:
            continue
        found.setdefault(task, {}).setdefault(model, {}).update(zip(content["items"], scores, strict=True))
    return [_table(task, kinds[task], models) for task, models in found.items()]


def _table(task: str, kind: str, models: Mapping[str, Mapping[int, float]]) -> StoredItems:
    names: Sequence[str] = sorted(models)
    items = sorted({item for scores in models.values() for item in scores})
    scores = np.array([[models[name].get(item, np.nan) for item in items] for name in names], np.float64)
    return StoredItems(task, kind, tuple(names), tuple(items), scores)
