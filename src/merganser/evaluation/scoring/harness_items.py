"""Items of a task of lm-eval, scored part by part on a model that is in memory, without its command and without a folder."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ...errors import TaskError
from ...inference.language_model import Tokenizer
from ...inference.libraries import explained
from .batches import Refused
from .estimate import Estimate
from .harness_arguments import HarnessArguments
from .quiet import quiet

__all__ = ["HarnessItems", "Metric", "metrics_of"]

_SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lm-eval's own."""

_OF_PAIRS = ("weighted_perplexity", "bits_per_byte")
_AGGREGATIONS = ("mean", "perplexity", *_OF_PAIRS)
"""Aggregations of lm-eval that follow from values of the items of any part: means, and functions of means."""

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Metric:
    """A metric of a task that can be computed from values of its items.

    Args:
        name: Its name here: that of lm-eval, with the filter behind a comma where it has a name of its own.
        key: Its name in lm-eval.
        filter: The filter of the answers.
        aggregation: One of `_AGGREGATIONS`.
        higher: Whether higher is better.
    """

    name: str
    key: str
    filter: str
    aggregation: str
    higher: bool

    @property
    def weight(self) -> str:
        """Name of the column of weights, where a value is a sum with a weight: log-likelihood and bytes or words."""
        return f"{self.name} weight"

    @property
    def rising(self) -> bool:
        """Whether higher values of items are better; those of likelihoods are, whatever is computed from them."""
        return self.higher or self.aggregation != "mean"

    def estimate(self, columns: Mapping[str, ArrayLike], items: Hashable) -> Estimate:
        """Return the metric from the values of items; for the arguments see `HarnessItems.metrics`."""
        above = np.asarray(columns[self.name], np.float64)
        below = np.asarray(columns[self.weight], np.float64) if self.weight in columns else np.ones(len(above))
        mean = Estimate.of_ratio(above, below, items)
        if self.aggregation == "mean":
            return mean
        if self.aggregation == "bits_per_byte":
            return mean * (-1 / math.log(2))
        value = math.exp(-mean.value)
        return Estimate(value, {key: -value * part for key, part in mean.parts.items()})

    def scores(self, columns: Mapping[str, ArrayLike]) -> list[float]:
        """Return the score of each item, at least 0, where higher is better: of likelihoods the probability."""
        above = np.asarray(columns[self.name], np.float64)
        if self.aggregation == "mean":
            found = np.maximum(above, 0.0) if self.higher else np.exp(-np.maximum(above, 0.0))
        else:
            below = np.asarray(columns[self.weight], np.float64) if self.weight in columns else 1.0
            found = np.exp(above / np.maximum(below, 1.0))
        return [float(value) for value in found]


def metrics_of(task: Any, order: Sequence[str]) -> list[Metric]:
    """Return the metrics of a task of lm-eval that follow from values of its items, the main metric first.

    Args:
        task: A task object of lm-eval.
        order: Names of its metrics, in the order of its file.
    """
    higher = task.higher_is_better()
    filters = [entry["name"] for entry in task.dump_config().get("filter_list") or [{"name": "none"}]]
    found = []
    aggregations = task.aggregation()
    for key in sorted(aggregations, key=lambda name: order.index(name) if name in order else len(order)):
        own = aggregations[key]
        kind = getattr(own, "__name__", "")
        if kind in _AGGREGATIONS and getattr(own, "__module__", "") == "lm_eval.api.metrics":
            found += [
                Metric(key if name == "none" else f"{key},{name}", key, name, kind, higher.get(key) is not False)
                for name in filters
            ]
    return found


class HarnessItems:
    """The items of a task of lm-eval.

    Args:
        source: The task as given, for messages.
        key: Its name in lm-eval.
        hash: Hash of its settings and items.
        task: Its object in lm-eval, which is kept between calls.
        metrics: Its metrics, the main one first.
        arguments: Arguments of lm-eval.
        tokenizer: Tokenizer of the models.
        limit: Number of items; None for all.
        rows: Number of rows of a batch.
    """

    def __init__(
        self,
        source: str,
        key: str,
        hash: str,
        task: Any,
        metrics: Sequence[Metric],
        arguments: HarnessArguments,
        tokenizer: Tokenizer,
        limit: int | None,
        rows: int,
    ) -> None:
        self.hash = hash
        self.known = tuple(metrics)
        self._source, self._key, self._task, self._rows = source, key, task, rows
        self._arguments = arguments
        count = len(task.eval_docs)
        self.items = range(count if limit is None else min(count, limit))
        # a copy, because lm-eval adds a padding token to the tokenizer
        self._tokenizer = copy.deepcopy(tokenizer.encoder)
        self._settle()

    @property
    def higher(self) -> dict[str, bool]:
        """Whether higher is better, by metric; the main metric first."""
        return {metric.name: metric.higher for metric in self.known}

    def metrics(self, columns: Mapping[str, ArrayLike], items: Hashable) -> dict[str, Estimate]:
        """Return the metrics from the values of items.

        Args:
            columns: What `measure_items` returns, one entry per item.
            items: Key of this set of items.
        """
        return {metric.name: metric.estimate(columns, items) for metric in self.known}

    def measure_items(self, model: Any, items: Sequence[int]) -> dict[str, list[float]]:
        """Score some items on a loaded model.

        Args:
            model: A causal language model of transformers.
            items: Numbers of documents.

        Returns:
            Values by metric, in the order of `items`.

        Raises:
            Refused: The model's output cannot be scored.
            TaskError: lm-eval failed.
        """
        chosen = sorted(items)
        with quiet(always=True), explained(TaskError, f"{self._source}: lm-eval cannot run it"):
            found = self._evaluate(model, chosen)
        samples = {(sample["filter"], sample["doc_id"]): sample for sample in found["samples"][self._key]}
        columns: dict[str, list[float]] = {}
        for metric in self.known:
            values = [samples[metric.filter, item][metric.key] for item in items]
            pairs = metric.aggregation in _OF_PAIRS
            columns[metric.name] = [float(value[0] if pairs else value) for value in values]
            if pairs:
                columns[metric.weight] = [float(value[1]) for value in values]
        if not all(math.isfinite(value) for column in columns.values() for value in column):
            raise Refused("NaN or an infinity in what lm-eval got from the model")
        self._check(columns, found["results"][self._key])
        return columns

    def _evaluate(self, model: Any, chosen: list[int]) -> Any:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        given = self._arguments.evaluation
        seeds = {name: given.get(name, seed) for name, seed in _SEEDS.items()}
        # as simple_evaluate does it, which would load the task again and start processes to describe the machine
        random.seed(seeds["random_seed"])
        np.random.seed(seeds["numpy_random_seed"])  # noqa: NPY002
        torch.manual_seed(seeds["torch_random_seed"])
        self._task.set_fewshot_seed(seed=seeds["fewshot_random_seed"])
        wrapped = HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=self._rows, **self._arguments.model)
        return evaluate(
            lm=wrapped,
            task_dict={"tasks": {self._key: self._task}, "groups": {}, "group_map": {}},
            samples={self._key: chosen},
            # errors follow from the values of the items
            bootstrap_iters=0,
            log_samples=True,
            system_instruction=given.get("system_instruction"),
            apply_chat_template=given.get("apply_chat_template", False),
            fewshot_as_multiturn=given.get("fewshot_as_multiturn", True),
            confirm_run_unsafe_code=given.get("confirm_run_unsafe_code", False),
        )

    def _settle(self) -> None:
        """Give the task the settings that `lm_eval.simple_evaluate` would."""
        given, task = self._arguments.evaluation, self._task
        if given.get("gen_kwargs") and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(given["gen_kwargs"]), update=True)
        own, wanted = task.get_config("num_fewshot"), given.get("num_fewshot")
        # lm-eval keeps a 0 that a task sets itself
        if own is None or (wanted is not None and own != 0):
            task.set_config(key="num_fewshot", value=wanted or 0)

    def _check(self, columns: Mapping[str, Sequence[float]], reported: Mapping[str, Any]) -> None:
        """Compare what follows from the values of the items with what lm-eval reports.

        Raises:
            TaskError: They differ.
        """
        for metric in self.known:
            own, theirs = metric.estimate(columns, "").value, reported[f"{metric.key},{metric.filter}"]
            if not math.isclose(own, theirs, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
                raise TaskError(
                    f"{self._source}: lm-eval reports {theirs:g} {metric.name}, and its items give {own:g}; score it with a "
                    "command: --command 'CMD {model}'"
                )
