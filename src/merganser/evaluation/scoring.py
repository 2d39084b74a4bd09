"""Score a model on tasks, batch by batch, with a journal of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from .batches import Prepared, Refused
from .choices import prepare_choices
from .harness import Harness, PreparedHarness
from .journal import Journal
from .loading import LanguageModel
from .outcome import Outcome
from .tasks import ChoiceTask, Task, TextTask
from .text import prepare_text

_VERSION = 1  # of the scorer: another one does not continue a journal
_HARNESS_TOKENS = 512  # lm-eval counts rows


@dataclass(frozen=True)
class Settings:
    """What figures depend on, beside models and tasks.

    Args:
        limit: Number of items of each task; None for all.
        context: Most tokens that a model sees at once of a text.
        stride: Tokens that each window of a text scores.
        dtype: Name of the number format.
        batch_tokens: Tokens that a batch may feed.
        device: Where models are scored.
    """

    limit: int | None
    context: int
    stride: int
    dtype: str
    batch_tokens: int
    device: torch.device


@dataclass(frozen=True)
class Job:
    """A task to score a model on.

    Args:
        task: The task.
        prepared: The task in the tokens of the model.
        key: Identifies model, task and settings in the journal.
    """

    task: Task
    prepared: Prepared
    key: str


@dataclass
class Scorer:
    """Scores models.

    Args:
        settings: The settings.
        journal: Keeps what was measured.
        harness: Carries out the tasks of lm-eval; None where there are none.
        tell: Told the model, the task, batches done and batches in all.
    """

    settings: Settings
    journal: Journal
    harness: Harness | None
    tell: Callable[[str, str, int, int], None]

    def __post_init__(self) -> None:
        self._rows: dict[Any, Prepared] = {}

    def job(self, model: LanguageModel, name: str, task: Task) -> Job:
        """Turn a task into the tokens of a model.

        Raises:
            TaskError: The task does not fit the model.
        """
        s = self.settings
        if isinstance(task, TextTask | ChoiceTask):
            vocabulary = model.config.get_text_config().vocab_size
            # models of one base mostly share their tokenizer, and with it the tokens
            place = (task.name, model.tokenizer.hash, model.positions, vocabulary)
            if place not in self._rows:
                self._rows[place] = self._own(model, task, vocabulary)
            return Job(task, self._rows[place], self._key(model, task.hash))
        assert self.harness is not None
        rows = max(1, s.batch_tokens // _HARNESS_TOKENS)
        prepared = PreparedHarness(task, self.harness, model.tokenizer, name, s.limit, rows)
        return Job(task, prepared, self._key(model, self.harness.hash(task)))

    def pending(self, jobs: list[Job]) -> bool:
        """Whether anything is left to measure."""
        return any(self.journal.get(job.key, i) is None for job in jobs for i in range(len(job.prepared.batches)))

    def run(self, name: str, loaded: Any, job: Job) -> Outcome:
        """Score a model on a task, as far as the journal does not have it.

        Args:
            name: Name of the model.
            loaded: The model; None where nothing is left to measure.
            job: The task.

        Raises:
            TaskError: lm-eval failed.
        """
        contents = []
        batches = job.prepared.batches
        for index, rows in enumerate(batches):
            self.tell(name, job.task.name, index, len(batches))
            content = self.journal.get(job.key, index)
            if content is None:
                try:
                    content = job.prepared.measure(loaded, rows)
                except Refused as error:
                    return Outcome(failed=str(error))
                self.journal.add(job.key, index, content, model=name, task=job.task.name)
            contents.append(content)
        self.tell(name, job.task.name, len(batches), len(batches))
        return job.prepared.outcome(contents)

    def _own(self, model: LanguageModel, task: TextTask | ChoiceTask, vocabulary: int) -> Prepared:
        s = self.settings
        common: dict[str, Any] = {"limit": s.limit, "vocabulary": vocabulary, "budget": s.batch_tokens}
        if isinstance(task, TextTask):
            return prepare_text(task, model.tokenizer, context=s.context, stride=s.stride, **common)
        return prepare_choices(task, model.tokenizer, positions=model.positions, **common)

    def _key(self, model: LanguageModel, task: str) -> str:
        import transformers

        s = self.settings
        settings = (s.limit, s.context, s.stride, s.dtype, s.batch_tokens, s.device.type)
        versions = (_VERSION, torch.__version__, transformers.__version__)
        return xxhash.xxh3_128_hexdigest(repr((model.source.hash, task, settings, versions)).encode())
