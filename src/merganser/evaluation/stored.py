"""Read an evaluation back from the JSON that `merganser eval` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, UnsupportedError
from ..jsonfile import Entry, read_object

__all__ = ["Estimate", "EvaluatedModel", "Evaluation", "Retention", "Score", "Task", "read_evaluation"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number and its standard error.

    Args:
        place: Its place in the JSON, for messages.
        value: None if there is no number.
        stderr: None if it is not known.
        about: Name of the task, if the JSON gives it together with the number; else empty.
    """

    place: str
    value: float | None
    stderr: float | None
    about: str = ""


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model that was scored.

    Args:
        name: Short, unique name.
        reference: The reference as given.
        kind: "checkpoint", "adapter", "recipe" or "sidecar".
        role: "base", "expert" or "model".
        hash: Hash of weights, config and tokenizer; None if they could not be read.
        failed: Why it could not be scored; None if it was.
    """

    name: str
    reference: str
    kind: str
    role: str
    hash: str | None
    failed: str | None


@dataclass(frozen=True, slots=True)
class Task:
    """A task that models were scored on; `metric` is its main metric."""

    name: str
    kind: str
    source: str
    role: str | None
    metric: str
    higher_is_better: bool
    items: int
    unit: str


@dataclass(frozen=True, slots=True)
class Score:
    """Result of a model on a task: the value of the main metric, or why there is none."""

    failed: str | None
    items: int
    estimate: Estimate | None


@dataclass(frozen=True, slots=True)
class Retention:
    """What a model recovered and forgot.

    Args:
        recovered: By domain, the share of the expert's gain over the base; None if the domain is not counted.
        mean: Mean of `recovered` over the domains.
        worst: Smallest `recovered`, with the name of the domain.
        forgotten: By task without an expert, the loss against the base; positive is worse.
        mean_forgotten: Mean of the losses, each divided by the base's value.
        against_best_single: Mean recovered, minus that of the best of base and experts.
    """

    recovered: Mapping[str, Estimate | None]
    mean: Estimate | None
    worst: Estimate | None
    forgotten: Mapping[str, Estimate]
    mean_forgotten: Estimate | None
    against_best_single: Estimate | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of `merganser eval`.

    Args:
        file: The file that was read.
        created: Date and time of the evaluation.
        settings: Settings as text.
        models: Models in the order base, experts, others.
        tasks: Tasks in the order given.
        scores: Scores by model and task, without models that failed.
        reference: The model that is subtracted in `differences`; None if there are none.
        differences: Differences of the main metric by model and task; paired item by item where that was possible.
        retention: Retention by model; empty if no base and experts were given.
        best_single: Name of the base or expert that recovered most; None if that was not measured.
        not_counted: Domains that do not count, and why.
        warnings: What the user should know.
        seconds: Duration of the evaluation.
    """

    file: Path
    created: str
    settings: Mapping[str, str]
    models: Sequence[EvaluatedModel]
    tasks: Sequence[Task]
    scores: Mapping[tuple[str, str], Score]
    reference: str | None
    differences: Mapping[tuple[str, str], Estimate]
    retention: Mapping[str, Retention]
    best_single: str | None
    not_counted: Mapping[str, str]
    warnings: Sequence[str]
    seconds: float


def read_evaluation(file: str | Path) -> Evaluation:
    """Read an evaluation.

    Args:
        file: The file that `merganser eval --json FILE` wrote.

    Raises:
        NotFoundError: There is no such file.
        CheckpointError: It is damaged, or not an evaluation.
        UnsupportedError: It has a later format.
    """
    file = Path(file)
    root = Entry(read_object(file), str(file))
    kind = root.get("kind")
    if kind is None or kind.text() != "evaluation":
        raise CheckpointError(f"{file}: is not an evaluation; give the file that merganser eval --json wrote")
    version = root["format"].whole()
    if version > FORMAT:
        raise UnsupportedError(
            f"{file}: is of format {version}, and this version of merganser reads up to {FORMAT}; install a later one"
        )
    tasks = [_task(name, entry) for name, entry in root["tasks"].items()]
    metrics = {task.name: task.metric for task in tasks}
    retention, differences = root.get("retention"), root.get("differences")
    domains = [] if retention is None else list(retention["domains"].items())
    best = None if retention is None else retention.get("best_single")
    return Evaluation(
        file=file,
        created=root["created"].text(),
        settings={name: entry.shown() for name, entry in root["settings"].items()},
        models=[_model(name, entry) for name, entry in root["models"].items()],
        tasks=tasks,
        scores={
            (model, task): _score(entry, metrics.get(task, ""))
            for model, results in root["results"].items()
            for task, entry in results.items()
        },
        reference=None if differences is None else _text(differences, "reference"),
        differences={
            (model, task): _estimate(entry)
            for model, found_tasks in (() if differences is None else differences["models"].items())
            for task, entry in found_tasks.items()
        },
        retention={} if retention is None else {name: _kept(entry) for name, entry in retention["models"].items()},
        best_single=None if best is None else _text(best, "model"),
        not_counted={name: _text(entry, "reason") or "" for name, entry in domains if not entry["counted"].flag()},
        warnings=root["warnings"].each(Entry.text),
        seconds=root["seconds"].number(),
    )


def _model(name: str, entry: Entry) -> EvaluatedModel:
    return EvaluatedModel(
        name=name,
        reference=entry["reference"].text(),
        kind=entry["kind"].text(),
        role=entry["role"].text(),
        hash=_text(entry, "hash"),
        failed=_text(entry, "failed"),
    )


def _task(name: str, entry: Entry) -> Task:
    return Task(
        name=name,
        kind=entry["kind"].text(),
        source=entry["source"].text(),
        role=_text(entry, "role"),
        metric=entry["metric"].text(),
        higher_is_better=entry["higher_is_better"].flag(),
        items=entry["items"].whole(),
        unit=entry["unit"].text(),
    )


def _score(entry: Entry, metric: str) -> Score:
    value = entry["metrics"].get(metric)
    return Score(_text(entry, "failed"), entry["items"].whole(), None if value is None else _estimate(value))


def _kept(entry: Entry) -> Retention:
    recovered = entry["recovered"]
    return Retention(
        recovered={name: _maybe(recovered, name) for name in recovered.names()},
        mean=_maybe(entry, "mean"),
        worst=_maybe(entry, "worst"),
        forgotten={name: _estimate(found) for name, found in entry["forgotten"].items()},
        mean_forgotten=_maybe(entry, "mean_forgotten"),
        against_best_single=_maybe(entry, "against_best_single"),
    )


def _maybe(entry: Entry, key: str) -> Estimate | None:
    value = entry.get(key)
    return None if value is None else _estimate(value)


def _estimate(entry: Entry) -> Estimate:
    value, stderr = entry.get("value"), entry.get("stderr")
    return Estimate(
        place=entry.place,
        value=None if value is None else value.number(),
        stderr=None if stderr is None else stderr.number(),
        about=_text(entry, "domain") or "",
    )


def _text(entry: Entry, key: str) -> str | None:
    value = entry.get(key)
    return None if value is None else value.text()
