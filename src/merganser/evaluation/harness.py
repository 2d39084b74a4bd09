"""Tasks that lm-eval carries out, by name or in its own YAML format."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import MergeError, TaskError, did_you_mean
from .batches import Refused
from .estimate import Estimate
from .loading import Tokenizer
from .outcome import Outcome
from .tasks import HarnessTask

_INSTALL = "pip install 'merganser[eval]'"
_LOGGERS = ("lm_eval", "lm-eval", "datasets")


@dataclass(frozen=True, slots=True)
class Opened:
    """A task of lm-eval that was found and whose items were read.

    Args:
        spec: What lm-eval is asked for.
        key: Its name in the results of lm-eval.
        hash: Identifies its settings and items.
    """

    spec: str
    key: str
    hash: str


class Harness:
    """lm-eval, with the tasks of an evaluation.

    Args:
        tasks: The tasks.

    Raises:
        TaskError: lm-eval is not installed, has no such task, or cannot read one.
    """

    def __init__(self, tasks: Sequence[HarnessTask]) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            named = ", ".join(task.source for task in tasks)
            raise TaskError(
                f"{named}: no such file here; if lm-eval has a task of that name: it is not installed, {_INSTALL}"
                if all(task.name == task.source for task in tasks)
                else f"{named}: lm-eval carries out such tasks, and it is not installed: {_INSTALL}"
            ) from None
        with _quiet():
            self._manager = TaskManager()
            self._opened = {task.name: self._open(task) for task in tasks}

    @property
    def version(self) -> str:
        """Version of lm-eval."""
        return _version()

    def hash(self, task: HarnessTask) -> str:
        """Return what identifies the settings and items of a task."""
        return self._opened[task.name].hash

    def _open(self, task: HarnessTask) -> Opened:
        path = Path(task.source).expanduser()
        if not path.exists() and task.source not in self._manager.all_tasks:
            near = did_you_mean(task.source, self._manager.all_tasks)
            raise TaskError(
                f"{task.source}: no such file, and lm-eval has no task of that name.{near} "
                "`lm-eval ls tasks` lists them"
            )
        spec = str(path.absolute()) if path.exists() else task.source
        with _explained(task):
            loaded = self._manager.load([spec])
            groups = [name for name in loaded["groups"] if name == task.source] or [*loaded["groups"]][:1]
            if not groups and len(loaded["tasks"]) != 1:
                names = sorted(loaded["tasks"])
                raise TaskError(
                    f"{task.source}: stands for {len(names)} tasks without a common figure; name them: "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
                )
            digest = xxhash.xxh3_128(_version().encode())
            for name, each in sorted(loaded["tasks"].items()):
                digest.update(json.dumps([name, each.dump_config()], default=str, sort_keys=True).encode())
                for document in each.eval_docs:
                    digest.update(json.dumps(document, default=str, sort_keys=True).encode())
        return Opened(spec, groups[0] if groups else next(iter(loaded["tasks"])), digest.hexdigest())

    def score(
        self, task: HarnessTask, model: Any, tokenizer: Tokenizer, *, limit: int | None, rows: int
    ) -> dict[str, Any]:
        """Let lm-eval score a model on a task.

        Args:
            task: The task.
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            limit: Number of documents.
            rows: Batch size.

        Returns:
            What `outcome` takes, as plain data.

        Raises:
            TaskError: lm-eval failed.
            Refused: The model gave NaN.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        opened = self._opened[task.name]
        with _quiet(), _explained(task):
            # lm-eval gives tokenizers a token for padding
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer.encoder), batch_size=rows)
            found = simple_evaluate(
                wrapped, tasks=[opened.spec], limit=limit, task_manager=self._manager, log_samples=True
            )
        samples = found.get("samples", {}).get(opened.key, [])
        if any(_has_nan(sample["resps"]) for each in found.get("samples", {}).values() for sample in each):
            raise Refused("NaN in what lm-eval got from the model")
        scored = {**found.get("groups", {}), **found["results"]}.get(opened.key, {})
        metrics = [*_metrics(scored, found["higher_is_better"].get(opened.key, {}), samples)]
        if not metrics:
            raise TaskError(f"{task.source}: lm-eval gives no figure for {opened.key}; name its tasks one by one")
        counts = found["n-samples"]
        items = (
            counts[opened.key]["effective"] if opened.key in counts else sum(c["effective"] for c in counts.values())
        )
        return {"metrics": metrics, "items": items}


@dataclass(frozen=True)
class PreparedHarness:
    """A task of lm-eval for a model: one batch, which lm-eval divides as it likes.

    Args:
        task: The task.
        harness: Carries it out.
        tokenizer: Of the model.
        model: Name of the model.
        limit: Number of documents.
        rows: Batch size.
    """

    task: HarnessTask
    harness: Harness
    tokenizer: Tokenizer
    model: str
    limit: int | None
    rows: int

    batches = ((0,),)

    def measure(self, model: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Let lm-eval score the model."""
        return self.harness.score(self.task, model, self.tokenizer, limit=self.limit, rows=self.rows)

    def outcome(self, contents: Sequence[Mapping[str, Any]]) -> Outcome:
        """Take the figures of lm-eval over."""
        return outcome(contents[0], self.task.name, self.model)


def outcome(content: Mapping[str, Any], task: str, model: str) -> Outcome:
    """Make an outcome of what `Harness.score` returned.

    Args:
        content: The plain data, of this run or from a journal.
        task: Name of the task.
        model: Name of the model.
    """
    items = (task, content["items"])
    metrics, columns, higher = {}, {}, {}
    for found in content["metrics"]:
        name, value, error = found["name"], found["value"], found["stderr"]
        higher[name] = found["higher_is_better"]
        if found["items"] is not None:
            columns[name] = np.array(found["items"], np.float64)
            # the same number, but for its last digit
            metrics[name] = replace(Estimate.of_ratio(columns[name], np.ones(len(columns[name])), items), value=value)
        elif error is not None:
            # independent of what other models got, as far as is known
            metrics[name] = Estimate.of_error(value, error, (items, model, name))
        else:
            metrics[name] = Estimate(value, {(items, model, name): np.zeros(1)})
    return Outcome(metrics, columns, content["items"], {}, higher)


def _metrics(
    scored: Mapping[str, Any], higher: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the metrics of a task: value and standard error of lm-eval, and the values of items where it is their mean."""
    for key, value in scored.items():
        metric, _, filtered = key.partition(",")
        if isinstance(value, bool) or not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
            continue
        error = scored.get(f"{metric}_stderr,{filtered}")
        known = [
            sample[metric] for sample in samples if sample.get("filter", filtered) == filtered and metric in sample
        ]
        plain = bool(known) and all(isinstance(each, int | float) for each in known)
        same = plain and math.isclose(sum(known) / len(known), value, rel_tol=1e-9, abs_tol=1e-12)
        yield {
            "name": metric if filtered == "none" else key,
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
            "higher_is_better": higher.get(metric) is not False,
            "items": [float(each) for each in known] if same else None,
        }


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, list | tuple) and any(map(_has_nan, value))


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


@contextmanager
def _explained(task: HarnessTask) -> Iterator[None]:
    """Turn whatever lm-eval raises into an error that names the task."""
    try:
        yield
    except MergeError:
        raise
    # tasks are code and data of many authors, so errors are of any kind
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise TaskError(f"{task.source}: lm-eval cannot carry it out: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lm-eval logs off the terminal, below errors."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
