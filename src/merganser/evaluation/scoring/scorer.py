"""Score a model on tasks, batch by batch, and record the measurements in a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash

from ...errors import TaskError
from ...inference.language_model import LanguageModel
from ...runtime.routed.gated.evaluated import GatedLanguageModel
from ...runtime.routed.opened import RoutedLanguageModel
from ...runtime.routed.unequal.evaluated import UnequalLanguageModel
from .batches import Prepared, Refused
from .choices import prepare_choices
from .harness import Harness, outcome, rows_of
from .journal import Journal
from .outcome import Outcome
from .precision import Formats
from .routed import chosen_of, measure_gated, measure_routed
from .tasks import ChoiceTask, HarnessTask, Task, TextTask
from .text import prepare_text

_VERSION = 1  # raised when results change: measurements of another version in a journal are not used


def check_routed(models: Iterable[LanguageModel], tasks: Iterable[Task]) -> None:
    """Check that no task of lm-eval meets a model that chooses among several, before lm-eval fetches its data.

    Raises:
        TaskError: One does.
    """
    task = next((task for task in tasks if isinstance(task, HarnessTask)), None)
    model = next((own for own in models if isinstance(own, RoutedLanguageModel | UnequalLanguageModel)), None)
    if task is not None and model is not None:
        raise TaskError(
            f"{task.source}: tasks of lm-eval are scored by one model, and {model.source.reference} chooses among several; "
            "give texts or questions, or name one of them"
        )


@dataclass(frozen=True)
class Settings:
    """Settings that results depend on, in addition to models and tasks.

    Args:
        limit: Number of items of each task; None for all.
        context: Largest number of tokens of a text in one window.
        stride: Tokens that each window of a text scores.
        formats: Dtypes for each kind of task.
        batch_tokens: Largest number of input tokens of a batch.
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
        prepared: The task, tokenised for the model; None for tasks of lm-eval, which tokenises them itself.
        dtype: Dtype in which it is scored.
        key: Key of model, task and settings in the journal.
    """

    task: Task
    prepared: Prepared | None
    dtype: str
    key: str

    @property
    def batches(self) -> Sequence[Sequence[int]]:
        """Indices of rows, batch by batch; a task of lm-eval is one batch."""
        return ((0,),) if self.prepared is None else self.prepared.batches


@dataclass
class Scorer:
    """Scores models.

    Args:
        settings: The settings.
        journal: Stores the measurements.
        harness: Runs the tasks of lm-eval; None if there are none.
        tell: Called with the model, the task, the number of finished batches, and the number of all batches.
    """

    settings: Settings
    journal: Journal
    harness: Harness | None
    tell: Callable[[str, str, int, int], None]

    def __post_init__(self) -> None:
        self._rows: dict[Any, Prepared] = {}

    def job(self, model: LanguageModel, task: Task) -> Job:
        """Tokenise a task for a model.

        Raises:
            TaskError: The task does not suit the model.
        """
        dtype = self.settings.formats.of(task.kind, model.config)
        if isinstance(task, TextTask | ChoiceTask):
            vocabulary = model.config.get_text_config().vocab_size
            # models of one base usually share the tokenizer, and so the tokenised task
            place = (task.name, model.tokenizer.hash, model.positions, vocabulary)
            if place not in self._rows:
                self._rows[place] = self._own(model, task, vocabulary)
            return Job(task, self._rows[place], dtype, self._key(model, task.hash, dtype))
        assert self.harness is not None
        return Job(task, None, dtype, self._key(model, self.harness.hash(task), dtype))

    def pending(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that have batches without measurements."""
        return [job for job in jobs if any(self.journal.get(job.key, i) is None for i in range(len(job.batches)))]

    def run(self, name: str, model: LanguageModel, loaded: Any, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Score a model on tasks, except for batches that the journal already has.

        Args:
            name: Name of the model.
            model: The model.
            loaded: The model with its weights; None if the journal has all batches.
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
                outcomes[job.task.name] = self._run_own(name, model, loaded, job, job.prepared)
            elif job.task.name in failed:
                outcomes[job.task.name] = failed[job.task.name]
            else:
                content = self.journal.get(job.key, 0)
                assert content is not None
                outcomes[job.task.name] = outcome(content, job.task.name, name)
        return outcomes

    def _run_harness(self, name: str, model: LanguageModel, loaded: Any, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Run the tasks of lm-eval that are not in the journal; return outcomes of those on which the model failed."""
        left = {job.task.name: job for job in self.pending([job for job in jobs if job.prepared is None])}
        if not left:
            return {}
        assert self.harness is not None
        s = self.settings
        tasks = [job.task for job in left.values() if isinstance(job.task, HarnessTask)]
        self.tell(name, ", ".join(left), 0, 1)
        rows = rows_of(s.batch_tokens)
        plain = loaded.model if isinstance(model, GatedLanguageModel) else loaded
        contents = self.harness.score(tasks, plain, model.tokenizer, limit=s.limit, rows=rows)
        failed = {}
        for task, content in contents.items():
            if "failed" in content:
                failed[task] = Outcome(failed=content["failed"])
            else:
                self.journal.add(left[task].key, 0, content, model=name, task=task)
        return failed

    def _run_own(self, name: str, model: LanguageModel, loaded: Any, job: Job, prepared: Prepared) -> Outcome:
        contents = []
        for index, rows in enumerate(prepared.batches):
            self.tell(name, job.task.name, index, len(prepared.batches))
            content = self.journal.get(job.key, index)
            if content is None:
                try:
                    if isinstance(model, RoutedLanguageModel):
                        content = measure_routed(model, loaded, job.task.name, prepared, rows)
                    elif isinstance(model, GatedLanguageModel | UnequalLanguageModel):
                        content = measure_gated(model, loaded, prepared, rows)
                    else:
                        content = prepared.measure(loaded, rows)
                except Refused as error:
                    return Outcome(failed=str(error))
                self.journal.add(job.key, index, content, model=name, task=job.task.name)
            contents.append(content)
        self.tell(name, job.task.name, len(prepared.batches), len(prepared.batches))
        return replace(prepared.outcome(contents), chosen=chosen_of(contents))

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
