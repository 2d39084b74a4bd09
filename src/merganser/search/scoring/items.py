"""The items of the tasks, in waves and halves, and the table of what every model scored on each of them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import TaskError
from ...evaluation.scoring import choices, text
from ...evaluation.scoring.batches import Scorable
from ...evaluation.scoring.estimate import Estimate
from ...evaluation.scoring.harness_items import HarnessItems
from ...evaluation.scoring.journal import Journal
from ...evaluation.scoring.tasks import Task, TextTask

LEAST = 4
"""Fewest items of a task: two to choose with, and two to test with."""

HELD = -1
"""Number of the wave of items that are held out."""

_WAVES = 3
_LEAST_FOR_WAVES = 8
"""Fewest items of trials that are divided into waves."""


@dataclass(frozen=True)
class Split:
    """The items of one task.

    Args:
        task: The task.
        prepared: The task, tokenised.
        waves: Items that trials are scored on, wave by wave; the waves after the first may be empty.
        held: Items that only the end of the search is scored on.
        dtype: Dtype in which models are scored on it.
    """

    task: Task
    prepared: Scorable
    waves: tuple[tuple[int, ...], ...]
    held: tuple[int, ...]
    dtype: str = "float32"

    @property
    def hash(self) -> str:
        """Hash of the file, or of the settings and items of a task of lm-eval."""
        return self.prepared.hash if isinstance(self.prepared, HarnessItems) else self.task.hash

    @property
    def higher(self) -> Mapping[str, bool]:
        """Whether higher is better, by metric; the main metric first."""
        if isinstance(self.prepared, HarnessItems):
            return self.prepared.higher
        return text.HIGHER if isinstance(self.task, TextTask) else choices.HIGHER

    @property
    def main(self) -> str:
        """Name of the main metric."""
        return next(iter(self.higher))

    def metrics(self, columns: Mapping[str, ArrayLike], items: Hashable) -> dict[str, Estimate]:
        """Return the metrics from what was measured of items.

        Args:
            columns: What `Scorable.measure_items` returns.
            items: Key of this set of items.
        """
        if isinstance(self.prepared, HarnessItems):
            return self.prepared.metrics(columns, items)
        if isinstance(self.task, TextTask):
            return text.text_metrics(columns, items)
        return choices.choice_metrics(columns, items)

    def scores(self, columns: Mapping[str, ArrayLike]) -> list[float]:
        """Return the score of each item, at least 0, where higher is better: of texts the probability of a byte."""
        if isinstance(self.prepared, HarnessItems):
            return self.prepared.known[0].scores(columns)
        if isinstance(self.task, TextTask):
            bits, size = np.asarray(columns["bits"], np.float64), np.asarray(columns["bytes"], np.float64)
            return [float(value) for value in np.exp2(-bits / np.maximum(size, 1))]
        return [float(value) for value in np.asarray(columns["correct"], np.float64)]

    def items(self, wave: int) -> tuple[int, ...]:
        """Return the items of a wave; those held out are the wave `HELD`."""
        return self.held if wave == HELD else self.waves[wave]


def split_task(task: Task, prepared: Scorable, seed: int, dtype: str) -> Split:
    """Divide the items of a task: half of them for trials, in waves, and half held out.

    Documents and questions are divided at random. A single text is cut in the middle: windows of one passage are alike,
    and the second half is a text that no trial saw. The waves of the first half are in random order, the first a quarter of it, the
    second as much, the third the rest; with fewer than 15 items there is one wave.

    Args:
        task: The task.
        prepared: The same, tokenised.
        seed: Seed of the random order.
        dtype: Dtype in which models are scored on it.

    Raises:
        TaskError: There are fewer than `LEAST` items.
    """
    count = len(prepared.items)
    if count < LEAST:
        raise TaskError(
            f"{task.source}: has {count} {task.unit}{'s' * (count != 1)}; a search needs at least {LEAST}: it chooses with one half, and "
            "tests with the other"
        )
    order = [*range(count)]
    chance = random.Random(f"{seed} {task.name}")
    if task.unit != "window":
        chance.shuffle(order)
    tune, held = order[: (count + 1) // 2], order[(count + 1) // 2 :]
    chance.shuffle(tune)
    first = math.ceil(len(tune) / 4)
    cuts = [0, first, 2 * first, len(tune)] if len(tune) >= _LEAST_FOR_WAVES else [0, *[len(tune)] * _WAVES]
    waves = tuple(tuple(sorted(tune[a:b])) for a, b in itertools.pairwise(cuts))
    return Split(task, prepared, waves, tuple(sorted(held)), dtype)


class Table:
    """The scores of every model on each item: one line per model, task and wave.

    Args:
        journal: Stores the lines.
        splits: The items by task.
    """

    def __init__(self, journal: Journal, splits: Mapping[str, Split]) -> None:
        self.journal = journal
        self.splits = dict(splits)

    @property
    def waves(self) -> list[int]:
        """The waves of trials that have items."""
        return [wave for wave in range(_WAVES) if any(split.items(wave) for split in self.splits.values())]

    def shorten(self, waves: int) -> None:
        """Leave out all waves of trials but the first ones, and the same share of the items held out.

        Args:
            waves: Number of waves that stay.
        """
        for task, split in self.splits.items():
            kept = tuple(items if number < waves else () for number, items in enumerate(split.waves))
            # at equal distances, so that all parts of a text are there
            count = max(1, len(split.held) * sum(map(len, kept)) // sum(map(len, split.waves)))
            held = tuple(split.held[number * len(split.held) // count] for number in range(count))
            self.splits[task] = replace(split, waves=kept, held=held)

    def count(self, waves: Sequence[int]) -> int:
        """Return the number of items of some waves, of all tasks."""
        return sum(len(split.items(wave)) for split in self.splits.values() for wave in waves)

    def whole(self) -> list[str]:
        """Return the keys of the models that were scored on all items of trials, sorted."""
        keys = {key.partition("/")[0] for key, _ in self.journal.keys}
        return sorted(key for key in keys if not any(self.missing(key, wave) for wave in self.waves))

    def columns(self, key: str, task: str, waves: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Return what was measured of a model on its items of some waves, in their order, by name, shape [items] each.

        Args:
            key: Key of the model; it was scored on all of them.
            task: The task.
            waves: The waves.
        """
        found = [self.journal.get(f"{key}/{task}", wave) for wave in waves if self.splits[task].items(wave)]
        contents = [content["columns"] for content in found if content is not None]
        return {name: np.concatenate([np.asarray(own[name], np.float64) for own in contents]) for name in contents[0]}

    def missing(self, key: str, wave: int) -> list[str]:
        """Return the tasks on whose items of a wave a model was not scored yet."""
        return [
            task
            for task, split in self.splits.items()
            if split.items(wave) and self.journal.get(f"{key}/{task}", wave) is None
        ]

    def add(
        self, key: str, task: str, wave: int, columns: Mapping[str, Any], name: str, seconds: float | None = None
    ) -> None:
        """Store the scores of a model on the items of a wave of a task, and how long they took."""
        split = self.splits[task]
        content = {"items": split.items(wave), "columns": dict(columns)}
        about = {"model": name, "task": task}
        if isinstance(split.prepared, HarnessItems) and split.prepared.known[0].rising:
            about["metric"] = split.main
        self.journal.add(f"{key}/{task}", wave, content, seconds, **about)

    def seconds(self, keys: Iterable[str]) -> float:
        """Return how long it took to make and score models, in this process or in earlier ones."""
        return sum(self.journal.seconds(f"{key}/{task}", wave) for key in keys for task, wave in self._places())

    def pace(self, keys: Sequence[str]) -> float:
        """Return the seconds that an item of some models took, in this process or in earlier ones; 0 if none was scored."""
        items = sum(
            len(self.splits[task].items(wave))
            for key in keys
            for task, wave in self._places()
            if self.journal.get(f"{key}/{task}", wave) is not None
        )
        return self.seconds(keys) / max(items, 1)

    def _places(self) -> list[tuple[str, int]]:
        return [(task, wave) for task in self.splits for wave in (*range(_WAVES), HELD)]

    def figures(self, key: str, waves: Sequence[int]) -> dict[str, Estimate]:
        """Return the metrics of a model over its items of some waves, by `TASK/METRIC`.

        Models over the same waves have paired items.

        Args:
            key: Key of the model; it was scored on all of them.
            waves: The waves.
        """
        found: dict[str, Estimate] = {}
        for task, split in self.splits.items():
            metrics = split.metrics(self.columns(key, task, waves), (task, tuple(waves)))
            found |= {f"{task}/{metric}": estimate for metric, estimate in metrics.items()}
        return found
