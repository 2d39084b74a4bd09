"""The result of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from ..files import write_whole
from ..inference.stored import Kind
from ..wording import html_table, plural
from .retention import Retention, measure_retention
from .roster import Role
from .scoring.estimate import Estimate
from .scoring.outcome import Outcome

FORMAT = 1


@dataclass(frozen=True)
class ModelInfo:
    """A model of an evaluation.

    Args:
        reference: The reference as the user wrote it.
        kind: Kind of the source.
        role: "base", "expert" (of a domain) or "model".
        hash: Hash of weights, config and tokenizer.
        tokenizer: Hash of the tokenizer.
        parameters: Number of weights; None if the model was not loaded, because the journal had all measurements.
        seconds: Time of loading (or merging) and of scoring.
        peak_memory: Peak resident memory of the process until this model was done, in bytes.
        failed: Why it could not be scored at all; None if it could.
        told: For a routed model, the task that belongs to each measured task, by its name; None for other models.
    """

    reference: str
    kind: Kind
    role: Role
    hash: str
    tokenizer: str
    parameters: int | None
    seconds: Mapping[str, float]
    peak_memory: int
    failed: str | None
    told: Mapping[str, str] | None = None


@dataclass(frozen=True)
class TaskInfo:
    """A task of an evaluation.

    Args:
        kind: Kind of task.
        source: File or name.
        hash: Hash of its contents.
        role: "domain" if it has an expert, else "retained"; None in an evaluation without experts.
        metric: Name of the main metric; None if no model has a result.
        higher_is_better: Whether a higher value of the main metric is better.
        metrics: Names of all metrics.
        items: Number of items.
        unit: What an item is: "document", "window" or "question".
    """

    kind: Literal["text", "choices", "lm-eval"]
    source: str
    hash: str
    role: Literal["domain", "retained"] | None
    metric: str | None
    higher_is_better: bool
    metrics: tuple[str, ...]
    items: int
    unit: str


@dataclass(frozen=True)
class Evaluation:
    """The results of models on tasks.

    Args:
        models: Models by name: the base, the experts, the others.
        tasks: Tasks by name, in the order given.
        outcomes: Outcomes by model and task, without models that failed as a whole.
        base: Name of the base.
        experts: Name of the expert for each domain.
        settings: Settings that the results depend on.
        versions: Versions of merganser, torch, transformers and lm-eval.
        hardware: Device, processor and number of threads.
        created: Date and time, UTC.
        seconds: Duration of the evaluation.
        peak_memory: Peak resident memory of the process so far, in bytes.
        items_file: Name of the journal with the measurements of every item, in the folder of the JSON.
        warnings: What the user should know.
    """

    models: Mapping[str, ModelInfo]
    tasks: Mapping[str, TaskInfo]
    outcomes: Mapping[str, Mapping[str, Outcome]]
    base: str | None
    experts: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str | None]
    hardware: Mapping[str, Any]
    created: str
    seconds: float
    peak_memory: int
    items_file: str | None
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Evaluation: {plural(len(self.models), 'model')}, {plural(len(self.tasks), 'task')}>"

    def _repr_html_(self) -> str:
        rows = [["", *(f"{name} ({task.metric})" for name, task in self.tasks.items())]]
        for model in self.models:
            found = [self.metric(model, task) for task in self.tasks]
            rows.append([model, *("failed" if one is None else f"{one.value:.4f}" for one in found)])
        return html_table(repr(self)[1:-1], rows)

    def metric(self, model: str, task: str, metric: str | None = None) -> Estimate | None:
        """Return the result of a model in a metric, by default the main metric of the task; None if there is none."""
        outcome = self.outcomes.get(model, {}).get(task)
        name = metric or self.tasks[task].metric
        return None if outcome is None or name is None else outcome.metrics.get(name)

    def difference(self, model: str, reference: str, task: str, metric: str | None = None) -> Estimate | None:
        """Return the result of a model minus that of `reference`, with the standard error of the paired items."""
        own, other = self.metric(model, task, metric), self.metric(reference, task, metric)
        return None if own is None or other is None else own - other

    def items(self, model: str, task: str) -> Mapping[str, NDArray[Any] | list[Any]]:
        """Return the measurements of each item, by name; empty if the model failed."""
        outcome = self.outcomes.get(model, {}).get(task)
        return {} if outcome is None else outcome.columns

    def right(self, model: str, task: str) -> float | None:
        """Return for which share of a task's rows a routed model chose the task that belongs to it; None if none does."""
        outcome, told = self.outcomes.get(model, {}).get(task), self.models[model].told
        if outcome is None or not outcome.chosen or told is None or task not in told:
            return None
        return outcome.chosen.get(told[task], 0) / sum(outcome.chosen.values())

    @cached_property
    def failures(self) -> list[str]:
        """A message for every model, or model and task, without a result."""
        found = [f"{name}: {info.failed}" for name, info in self.models.items() if info.failed]
        for model, own in self.outcomes.items():
            found += [f"{model}: {task}: {outcome.failed}" for task, outcome in own.items() if outcome.failed]
        return found

    @cached_property
    def retention(self) -> Retention | None:
        """What the models recovered and forgot; None without a base and experts."""
        if self.base is None or not self.experts:
            return None
        counting = {name: task for name, task in self.tasks.items() if task.metric is not None}
        figures = {
            model: {task: figure for task in counting if (figure := self.metric(model, task)) is not None}
            for model in self.outcomes
        }
        metrics = {name: str(task.metric) for name, task in self.tasks.items()}
        higher = {name: task.higher_is_better for name, task in self.tasks.items()}
        return measure_retention(figures, self.base, self.experts, metrics, higher)

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain data: format 1 of docs/evaluate.md."""
        return {
            "format": FORMAT,
            "kind": "evaluation",
            "created": self.created,
            "versions": dict(self.versions),
            "hardware": dict(self.hardware),
            "settings": dict(self.settings),
            "base": self.base,
            "experts": dict(self.experts),
            "models": {name: _described(info) for name, info in self.models.items()},
            "tasks": {name: {**vars(info), "metrics": list(info.metrics)} for name, info in self.tasks.items()},
            "results": {
                model: {
                    task: outcome.to_json() | ({"right": self.right(model, task)} if outcome.chosen else {})
                    for task, outcome in own.items()
                }
                for model, own in self.outcomes.items()
            },
            "differences": self._differences(),
            "retention": None if self.retention is None else self.retention.to_json(),
            "seconds": round(self.seconds, 3),
            "peak_memory": self.peak_memory,
            "items": self.items_file,
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, atomically.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def _differences(self) -> dict[str, Any]:
        reference = self.base or next(iter(self.models))
        found: dict[str, Any] = {}
        for model in self.outcomes:
            if model == reference:
                continue
            found[model] = {}
            for task, info in self.tasks.items():
                own, other = self.metric(model, task), self.metric(reference, task)
                if own is not None and other is not None:
                    paired = own.parts.keys() == other.parts.keys()
                    found[model][task] = {"metric": info.metric, **(own - other).to_json(), "paired": paired}
        return {"reference": reference, "models": found}


def _described(info: ModelInfo) -> dict[str, Any]:
    """Return a model for the JSON; only routed ones say what they were told."""
    return {key: value for key, value in vars(info).items() if key != "told" or value is not None}
