"""Score models on the items of a search: one model is loaded, and the weights of the next ones are written over its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ...engine.in_memory.run import Memory
from ...errors import MergeError, TaskError
from ...evaluation.run import Wanted
from ...evaluation.scoring.batches import Refused, Scorable
from ...evaluation.scoring.estimate import Estimate
from ...evaluation.scoring.harness import open_harness, rows_of
from ...evaluation.scoring.journal import Journal
from ...evaluation.scoring.scorer import Scorer, Settings
from ...evaluation.scoring.tasks import HarnessTask, Task
from ...inference.language_model import LanguageModel, Reused, Tokenizer, open_model
from ...inference.sources import Reference, open_source
from .items import Split, Table, split_task

__all__ = ["Bench", "Failed", "Model", "open_bench"]


class Failed(Exception):
    """A trial cannot be scored; the message says why, and the search goes on."""


@dataclass(frozen=True)
class Model:
    """A model to be scored.

    Args:
        key: Its key in the table.
        name: Its name for people.
        reference: A checkpoint, or the path of a recipe.
    """

    key: str
    name: str
    reference: Reference


class Bench:
    """Scores models.

    Args:
        table: Where scores are kept.
        settings: How models are scored.
        tokenizers: Loaded tokenizers, by hash; all models must have the first one.
        cache_dir: Folder for models from the Hub.
    """

    def __init__(
        self, table: Table, settings: Settings, tokenizers: dict[str, Tokenizer], cache_dir: Path | None
    ) -> None:
        self.table = table
        self.settings = settings
        self.tokenizers = tokenizers
        self._cache_dir = cache_dir
        self._memory = Memory()
        self._loaded: dict[str, Reused] = {}
        self._current: tuple[str, dict[str, object]] | None = None

    def score(self, model: Model, waves: Sequence[int]) -> dict[str, Estimate]:
        """Return the figures of a model over some waves; it is merged and scored where the table lacks something.

        Raises:
            Failed: It cannot be merged, loaded or scored.
        """
        for wave in waves:
            for task in self.table.missing(model.key, wave):
                split = self.table.splits[task]
                begin = time.monotonic()
                try:
                    loaded = self._load(model, split)
                    columns = split.prepared.measure_items(loaded, split.items(wave))
                except MergeError as error:
                    raise Failed(str(error)) from error
                except Refused as error:
                    # a trial is named by its number where this is shown, a model is not
                    named = f"{model.name}, {task}" if model.key.startswith("model ") else task
                    raise Failed(f"{named}: {error}") from error
                self.table.add(model.key, task, wave, columns, model.name, time.monotonic() - begin)
        return self.table.figures(model.key, waves)

    def score_all(
        self, models: Iterable[Model], waves: Sequence[int], tell: Callable[[str], None]
    ) -> dict[str, dict[str, Estimate]]:
        """Score models, and return their figures by name.

        Args:
            models: The models.
            waves: As for `score`.
            tell: Called with the name of each model that was not scored on all of these waves before.

        Raises:
            Failed: One of them has no figures.
        """
        found = {}
        for model in models:
            if any(self.table.missing(model.key, wave) for wave in waves):
                tell(model.name)
            found[model.name] = self.score(model, waves)
        return found

    def load(self, model: Model) -> None:
        """Load a model, unless it was the last one; scoring it takes no further time for that.

        Raises:
            Failed: It cannot be merged or loaded.
        """
        try:
            self._load(model, next(iter(self.table.splits.values())))
        except MergeError as error:
            raise Failed(str(error)) from error

    @property
    def loads(self) -> int:
        """How often a model was loaded by transformers, and not written over another."""
        return sum(reused.loads for reused in self._loaded.values())

    def _load(self, model: Model, split: Split) -> object:
        if self._current is None or self._current[0] != model.key:
            # the model that was loaded is overwritten, also where this fails or is interrupted
            self._current = None
            self._current = (model.key, self.read(model))
        return self._current[1][split.dtype]

    def read(self, model: Model) -> dict[str, object]:
        """Merge or read a model and return it loaded, by dtype; the one that was returned before is no longer valid.

        Raises:
            MergeError: It cannot be merged or loaded.
        """
        with ExitStack() as stack:
            opened = open_model(
                open_source(model.reference, stack, cache_dir=self._cache_dir, memory=self._memory), self.tokenizers
            )
            _check_tokenizer(opened, self.tokenizers)
            tensors = opened.source.read()
        found = {}
        for dtype in {split.dtype for split in self.table.splits.values()}:
            reused = self._loaded.setdefault(dtype, Reused(getattr(torch, dtype), self.settings.device))
            found[dtype] = reused.load(opened, tensors)
        return found


def open_bench(
    references: Mapping[str, Reference],
    tasks: Sequence[Task],
    wanted: Wanted,
    journal: Journal,
    seed: int,
    cache_dir: Path | None,
) -> tuple[Bench, dict[str, Model]]:
    """Open the models that a search begins with, and divide the items of its tasks.

    Args:
        references: Models by name.
        tasks: The tasks.
        wanted: How to score, as the user said.
        journal: Takes the scores.
        seed: Seed of the division.
        cache_dir: Folder for models from the Hub.

    Returns:
        What scores models, and those of `references` by name.

    Raises:
        TaskError: The models have different tokenizers, or a task does not suit them.
        MergeError: A model cannot be opened.
    """
    tokenizers: dict[str, Tokenizer] = {}
    with ExitStack() as stack:
        opened = {
            name: open_model(open_source(reference, stack, cache_dir=cache_dir), tokenizers)
            for name, reference in references.items()
        }
        for model in opened.values():
            _check_tokenizer(model, tokenizers)
        settings = wanted.settle(opened, tasks, journal)
        splits = _splits(tasks, next(iter(opened.values())), settings, wanted, seed)
        models = {
            name: Model(f"model {model.source.hash}", name, references[name]) for name, model in opened.items()
        }  # fmt: skip
    return Bench(Table(journal, splits), settings, tokenizers, cache_dir), models


def _splits(
    tasks: Sequence[Task], model: LanguageModel, settings: Settings, wanted: Wanted, seed: int
) -> dict[str, Split]:
    """Divide the items of the tasks, as the tokenizer of a model makes them."""
    harness = open_harness(tasks, wanted.harness)
    scorer = Scorer(settings, Journal(None), harness, lambda *_: None)
    splits = {}
    for task in tasks:
        job = scorer.job(model, task)
        prepared: Scorable | None = job.prepared
        if isinstance(task, HarnessTask):
            assert harness is not None
            rows = rows_of(settings.batch_tokens)
            prepared = harness.items(task, model.tokenizer, limit=settings.limit, rows=rows)
        assert prepared is not None
        splits[task.name] = split_task(task, prepared, seed, job.dtype)
    return splits


def _check_tokenizer(model: LanguageModel, tokenizers: Mapping[str, Tokenizer]) -> None:
    if model.tokenizer.hash != next(iter(tokenizers)):
        raise TaskError(
            f"{model.source.reference}: has another tokenizer than the first model, so their items would differ; a "
            "search compares models on the same items"
        )
