"""Run tasks of lm-eval, given by name or as a YAML file in its format."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ...errors import TaskError, did_you_mean
from ...inference.language_model import Tokenizer
from ...inference.libraries import explained
from ...jsonfile import exists
from .estimate import Estimate
from .harness_arguments import NO_ARGUMENTS, HarnessArguments
from .harness_items import HarnessItems, metrics_of
from .outcome import Outcome
from .quiet import quiet
from .tasks import HarnessTask, Task

_INSTALL = "pip install 'merganser[eval]'"
_REFUSED = "lm-eval cannot run it"
_ROW = 512
"""Assumed length of a row in tokens, because batch sizes of lm-eval are in rows."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A task of lm-eval whose items are loaded.

    Args:
        spec: Name or path that is passed to lm-eval.
        key: Its name in the results of lm-eval.
        hash: Hash of its settings and items, and of lm-eval's version.
        parts: Names of the tasks that it consists of.
        metrics: Names of its metrics, in the order of its file; the first is the main metric.
        tasks: The objects of lm-eval, by name.
    """

    spec: str
    key: str
    hash: str
    parts: tuple[str, ...]
    metrics: tuple[str, ...]
    tasks: Mapping[str, Any]


def open_harness(tasks: Sequence[Task], arguments: HarnessArguments) -> Harness | None:
    """Return the interface to lm-eval; None if no task is of lm-eval.

    Args:
        tasks: All tasks.
        arguments: Arguments of lm-eval.

    Raises:
        TaskError: As `Harness`, or there are arguments and no task of lm-eval.
    """
    named = [task for task in tasks if isinstance(task, HarnessTask)]
    if arguments and not named:
        raise TaskError(
            f"lm-eval: arguments are given ({', '.join(arguments.to_json())}), and no task is of lm-eval: name one, or give its "
            ".yaml"
        )
    return Harness(named, arguments) if named else None


def rows_of(batch_tokens: int) -> int:
    """Return the number of rows of a batch of lm-eval, for a number of tokens."""
    return max(1, batch_tokens // _ROW)


class Harness:
    """Interface to lm-eval for the tasks of an evaluation.

    Args:
        tasks: The tasks.
        arguments: Arguments that are passed on.

    Raises:
        TaskError: lm-eval is not installed, has no such task, or cannot load one.
    """

    def __init__(self, tasks: Sequence[HarnessTask], arguments: HarnessArguments = NO_ARGUMENTS) -> None:
        self._arguments = arguments
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise TaskError(_missing(tasks)) from None
        with quiet():
            self._manager = TaskManager()
            self._opened = {task.name: self._open(task) for task in tasks}

    @property
    def version(self) -> str:
        """Version of lm-eval."""
        return _version()

    def hash(self, task: HarnessTask) -> str:
        """Return the hash of the settings and items of a task."""
        return self._opened[task.name].hash

    def items(self, task: HarnessTask, tokenizer: Tokenizer, *, limit: int | None, rows: int) -> HarnessItems:
        """Return the items of a task, to be scored part by part.

        Args:
            task: The task.
            tokenizer: Tokenizer of the models.
            limit: Number of items; None for all.
            rows: Number of rows of a batch.

        Raises:
            TaskError: It is a group, or its main metric does not follow from values of its items.
        """
        opened = self._opened[task.name]
        if len(opened.parts) > 1:
            raise TaskError(
                f"{task.source}: is a group of {len(opened.parts)} tasks, and a search scores tasks one by one; name some of "
                f"them: {', '.join(opened.parts[:6])}{', ...' if len(opened.parts) > 6 else ''}"
            )
        own = opened.tasks[opened.parts[0]]
        with explained(TaskError, f"{task.source}: {_REFUSED}"):
            metrics = metrics_of(own, opened.metrics)
            if not metrics:
                raise TaskError(
                    f"{task.source}: none of its metrics ({', '.join(own.aggregation())}) is a mean over its items, so parts of it "
                    "have no figure; score it with a command: --command 'CMD {model}'"
                )
            return HarnessItems(
                task.source, opened.parts[0], opened.hash, own, metrics, self._arguments, tokenizer, limit, rows
            )

    def _open(self, task: HarnessTask) -> Opened:
        is_file = exists(task.source)
        if not is_file and task.source not in self._manager.all_tasks:
            near = did_you_mean(task.source, self._manager.all_tasks)
            raise TaskError(
                f"{task.source}: no such file, and lm-eval has no task of that name.{near} "
                "`lm-eval ls tasks` lists them"
            )
        spec = str(Path(task.source).expanduser().absolute()) if is_file else task.source
        with explained(TaskError, f"{task.source}: {_REFUSED}"):
            loaded = self._manager.load([spec])
            groups = [name for name in loaded["groups"] if name == task.source] or [*loaded["groups"]][:1]
            if not groups and len(loaded["tasks"]) != 1:
                names = sorted(loaded["tasks"])
                raise TaskError(
                    f"{task.source}: is a group of {len(names)} tasks without a common metric; name them: "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
                )
            digest = xxhash.xxh3_128(_version().encode())
            if self._arguments:
                digest.update(json.dumps(self._arguments.to_json(), sort_keys=True).encode())
            for name, each in sorted(loaded["tasks"].items()):
                digest.update(json.dumps([name, each.dump_config()], default=str, sort_keys=True).encode())
                for document in each.eval_docs:
                    digest.update(json.dumps(document, default=str, sort_keys=True).encode())
        first = next(iter(loaded["tasks"].values()))
        listed = first.dump_config().get("metric_list") or []
        metrics = tuple(str(entry.get("metric")) for entry in listed)
        key = groups[0] if groups else first.task_name
        return Opened(spec, key, digest.hexdigest(), tuple(loaded["tasks"]), metrics, loaded["tasks"])

    def score(
        self, tasks: Sequence[HarnessTask], model: Any, tokenizer: Tokenizer, *, limit: int | None, rows: int
    ) -> dict[str, dict[str, Any]]:
        """Let lm-eval score a model on all tasks in one call, because it batches over tasks, as its command does.

        Args:
            tasks: The tasks.
            model: A causal language model of transformers.
            tokenizer: Its tokenizer.
            limit: Number of documents of each task; None for all.
            rows: Batch size.

        Returns:
            For each task the `content` of `outcome`, as plain data; or {"failed": reason} if the model has no score.

        Raises:
            TaskError: lm-eval failed.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with quiet(), explained(TaskError, f"{', '.join(task.source for task in tasks)}: {_REFUSED}"):
            # a copy, because lm-eval adds a padding token to the tokenizer
            encoder = copy.deepcopy(tokenizer.encoder)
            wrapped = HFLM(pretrained=model, tokenizer=encoder, batch_size=rows, **self._arguments.model)
            specs = [self._opened[task.name].spec for task in tasks]
            results = simple_evaluate(
                wrapped,
                tasks=specs,
                limit=limit,
                task_manager=self._manager,
                log_samples=True,
                batch_size=rows,
                **self._arguments.evaluation,
            )
        return {task.name: _content(task, self._opened[task.name], results) for task in tasks}


def _content(task: HarnessTask, opened: Opened, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of one task from the results of lm-eval."""
    samples = {part: found.get("samples", {}).get(part, []) for part in opened.parts}
    if any(_has_nan(sample["resps"]) for own in samples.values() for sample in own):
        return {"failed": "NaN in what lm-eval got from the model"}
    scored = {**found.get("groups", {}), **found["results"]}.get(opened.key, {})
    higher = found["higher_is_better"].get(opened.key, {})
    metrics = [*_metrics(scored, higher, samples.get(opened.key, []))]
    if not metrics:
        raise TaskError(f"{task.source}: lm-eval reports no metric for {opened.key}; name its tasks one by one")
    metrics.sort(key=lambda metric: _rank(metric["name"], opened.metrics))
    items = sum(found["n-samples"][part]["effective"] for part in opened.parts)
    return {"metrics": metrics, "items": items}


def outcome(content: Mapping[str, Any], task: str, model: str) -> Outcome:
    """Return the outcome that follows from what `Harness.score` returned.

    Args:
        content: The plain data of one task, from this run or a journal.
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
            # use lm-eval's value; the mean over the items may differ from it in the last digit
            metrics[name] = replace(Estimate.of_ratio(columns[name], np.ones(len(columns[name])), items), value=value)
        elif error is not None:
            # without values of items, treat the result as independent of those of other models
            metrics[name] = Estimate.of_error(value, error, (items, model, name))
        else:
            metrics[name] = Estimate(value, {(items, model, name): np.zeros(1)})
    return Outcome(metrics, columns, content["items"], {}, higher)


def _metrics(
    scored: Mapping[str, Any], higher: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the metrics of a task: lm-eval's value and standard error, and item values if their mean is the value."""
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


def _rank(name: str, order: Sequence[str]) -> int:
    metric = name.partition(",")[0]
    return order.index(metric) if metric in order else len(order)


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, list | tuple) and any(map(_has_nan, value))


def _missing(tasks: Sequence[HarnessTask]) -> str:
    """Return the message that lm-eval is not installed; a missing name may also be a misspelt file name."""
    names = [task.source for task in tasks if not exists(task.source)]
    if not names:
        return f"{tasks[0].source}: tasks in this format are run by lm-eval, and it is not installed: {_INSTALL}"
    near = did_you_mean(names[0], [path.name for path in Path().iterdir()])
    return f"{names[0]}: no such file.{near} If lm-eval has a task of that name: it is not installed, {_INSTALL}"


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
