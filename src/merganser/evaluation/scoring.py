"""Score a model on tasks, batch by batch, with a journal of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from ..inference.language_model import LanguageModel
from .batches import Prepared, Refused
from .choices import prepare_choices
from .harness import Harness, outcome
from .journal import Journal
from .outcome import Outcome
from .precision import Formats
from .tasks import ChoiceTask, HarnessTask, Task, TextTask
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
        formats: Number formats.
        batch_tokens: Tokens that a batch may feed.
        device: Where models are scored.
    """

    limit: int | None
    context: int
    stride: int
    formats: Formats
    batch_tokens: int
    device: torch.device


@dataclass(frozen=True)
class Job:
    """A task to score a model on.

    Args:
        task: The task.
        prepared: The task in the tokens of the model; None where lm-eval sees to that.
        dtype: Number format to score it in.
        key: Identifies model, task and settings in the journal.
    """

    task: Task
    prepared: Prepared | None
    dtype: str
    key: str

    @property
    def batches(self) -> Sequence[Sequence[int]]:
        """Indices of rows, batch by batch; lm-eval's tasks are one batch."""
        return ((0,),) if self.prepared is None else self.prepared.batches


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

    def job(self, model: LanguageModel, task: Task) -> Job:
        """Turn a task into the tokens of a model.

        Raises:
            TaskError: The task does not fit the model.
        """
        dtype = self.settings.formats.of(task.kind, model.config)
        if isinstance(task, TextTask | ChoiceTask):
            vocabulary = model.config.get_text_config().vocab_size
            # models of one base mostly share their tokenizer, and with it the tokens
            place = (task.name, model.tokenizer.hash, model.positions, vocabulary)
            if place not in self._rows:
                self._rows[place] = self._own(model, task, vocabulary)
            return Job(task, self._rows[place], dtype, self._key(model, task.hash, dtype))
        assert self.harness is not None
        return Job(task, None, dtype, self._key(model, self.harness.hash(task), dtype))

    def pending(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs of which something is left to measure."""
        return [job for job in jobs if any(self.journal.get(job.key, i) is None for i in range(len(job.batches)))]

    def run(self, name: str, model: LanguageModel, loaded: Any, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Score a model on tasks, as far as the journal does not have it.

        Args:
            name: Name of the model.
            model: The model.
            loaded: The model with its weights; None where nothing is left to measure.
            jobs: The tasks.

        Returns:
            The outcomes by task.

        Raises:
            TaskError: lm-eval failed.
        """
        failed = self._run_harness(name, model, loaded, jobs)
        outcomes = {}
        for job in jobs:
            if job.prepared is not None:
                outcomes[job.task.name] = self._run_own(name, loaded, job, job.prepared)
            elif job.task.name in failed:
                outcomes[job.task.name] = failed[job.task.name]
            else:
                content = self.journal.get(job.key, 0)
                assert content is not None
                outcomes[job.task.name] = outcome(content, job.task.name, name)
        return outcomes

    def _run_harness(self, name: str, model: LanguageModel, loaded: Any, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Let lm-eval measure what is left; return the tasks on which the model failed."""
        left = {job.task.name: job for job in self.pending([job for job in jobs if job.prepared is None])}
        if not left:
            return {}
        assert self.harness is not None
        s = self.settings
        tasks = [job.task for job in left.values() if isinstance(job.task, HarnessTask)]
        self.tell(name, ", ".join(left), 0, 1)
        rows = max(1, s.batch_tokens // _HARNESS_TOKENS)
        contents = self.harness.score(tasks, loaded, model.tokenizer, limit=s.limit, rows=rows)
        failed = {}
        for task, content in contents.items():
            if "failed" in content:
                failed[task] = Outcome(failed=content["failed"])
            else:
                self.journal.add(left[task].key, 0, content, model=name, task=task)
        return failed

    def _run_own(self, name: str, loaded: Any, job: Job, prepared: Prepared) -> Outcome:
        contents = []
        for index, rows in enumerate(prepared.batches):
            self.tell(name, job.task.name, index, len(prepared.batches))
            content = self.journal.get(job.key, index)
            if content is None:
                try:
                    content = prepared.measure(loaded, rows)
                except Refused as error:
                    return Outcome(failed=str(error))
                self.journal.add(job.key, index, content, model=name, task=job.task.name)
            contents.append(content)
        self.tell(name, job.task.name, len(prepared.batches), len(prepared.batches))
        return prepared.outcome(contents)

    def _own(self, model: LanguageModel, task: TextTask | ChoiceTask, vocabulary: int) -> Prepared:
        s = self.settings
        common: dict[str, Any] = {"limit": s.limit, "vocabulary": vocabulary, "budget": s.batch_tokens}
        if isinstance(task, TextTask):
            return prepare_text(task, model.tokenizer, context=s.context, stride=s.stride, **common)
        return prepare_choices(task, model.tokenizer, positions=model.positions, **common)

    def _key(self, model: LanguageModel, task: str, dtype: str) -> str:
        import transformers

        s = self.settings
        settings = (s.limit, s.context, s.stride, dtype, s.batch_tokens, s.device.type)
        versions = (_VERSION, torch.__version__, transformers.__version__)
        return xxhash.xxh3_128_hexdigest(repr((model.source.hash, task, settings, versions)).encode())
