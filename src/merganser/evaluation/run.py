"""Evaluate models on tasks."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..engine.kernels.devices import resolve_devices
from ..errors import CheckpointError, MergeError, OutputError, TaskError, suggest_keywords
from ..inference.language_model import LanguageModel, Tokenizer, open_model
from ..inference.sources import Reference, open_source
from ..jsonfile import os_reason, read_object
from ..process import peak_memory
from ..runtime.routed.gated.evaluated import GatedLanguageModel
from ..runtime.routed.opened import RoutedLanguageModel, open_routed, routed_name
from ..runtime.routed.unequal.evaluated import UnequalLanguageModel
from ..version import __version__
from .result import Evaluation, ModelInfo, TaskInfo
from .roster import Models, Roster, make_roster
from .scoring.harness import Harness, open_harness
from .scoring.harness_arguments import NO_ARGUMENTS, HarnessArguments, parse_arguments
from .scoring.journal import Journal, journal_path
from .scoring.outcome import Outcome
from .scoring.precision import DTYPES, choose_formats, given_format
from .scoring.scorer import Job, Scorer, Settings, check_routed
from .scoring.tasks import ChoiceTask, HarnessTask, Task, TextTask, glued, load_tasks

_CHOOSING = RoutedLanguageModel | GatedLanguageModel | UnequalLanguageModel

CONTEXT = 512
BATCH_TOKENS = 4096


class Progress(Protocol):
    """Receives the progress of an evaluation."""

    def loading(self, model: str, number: int, count: int) -> None:
        """Called before model `number` (from 0) of `count` is read or merged."""

    def scoring(self, model: str, task: str, done: int, count: int) -> None:
        """Called when `done` of the `count` batches of a task are scored."""


class _Silent:
    def loading(self, model: str, number: int, count: int) -> None:
        """Do nothing."""

    def scoring(self, model: str, task: str, done: int, count: int) -> None:
        """Do nothing."""


@suggest_keywords
def evaluate(
    models: Models,
    tasks: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    base: Reference | None = None,
    experts: Mapping[str, Reference] | Sequence[str] = (),
    limit: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    lm_eval: Mapping[str, Any] | Sequence[str] = (),
    json: str | Path | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure models on tasks, and how much of their experts merges kept.

    Args:
        models: Checkpoints (folders, files, Hub ids), `MODEL+ADAPTER` (LoRA), recipes (`.yaml`, merged in memory) or
            loaded recipes; `OUT#TASK` is a task of a merge with sidecars, and `OUT#auto`, `OUT#perplexity`,
            `OUT#subspaces` and `OUT#told` choose one for each text: by the router, by the perplexity, by what value
            projections read, or as the measured task says. `NAME=` before one, or
            a mapping, names it.
        tasks: Text files (`.txt`), questions or documents (`.jsonl`), tasks of lm-eval (`.yaml`, or names);
            `NAME=` before one, or a mapping, names it.
        base: The base of the models.
        experts: A mapping from domain (the name of a task) to the model trained for it, or a list of `DOMAIN=MODEL`.
        limit: Number of items of each task: windows of a text, documents, questions.
        context: Largest number of tokens of a text in one window; by default 512, or the smallest context window of the
            models if that is less.
        stride: Tokens that each window of a text scores; by default half of `context`.
        dtype: float32, bfloat16 or float16. By default texts are scored in bfloat16 if that is faster on this device,
            questions in float32, and tasks of lm-eval in the dtype of each checkpoint.
        device: As for `merge`; the first one is used.
        batch_tokens: Largest number of input tokens of a batch.
        lm_eval: Arguments that are passed on to lm-eval, by name or as `NAME=VALUE`: `num_fewshot`, `apply_chat_template`,
            `max_length`, ...
        json: File for the result. The measurements of every item are stored next to it in `JSON.items.jsonl`, from
            which an interrupted evaluation continues.
        cache_dir: Folder for models from the Hub.
        progress: Receives the progress.

    Raises:
        TaskError: A task is missing, malformed, or does not suit a model.
        MergeError: A model cannot be opened.
    """
    arguments = parse_arguments(lm_eval)
    wanted = Wanted(
        limit=limit,
        context=context,
        stride=stride,
        dtype=dtype,
        batch_tokens=batch_tokens,
        device=resolve_devices(device)[0],
        harness=arguments,
    )
    loaded = load_tasks(tasks)
    roster = make_roster(models, base, experts, [task.name for task in loaded])
    out = None if json is None else Path(json)
    if out is not None:
        _check_out(out)
    evaluation = _measure(roster, loaded, wanted, out, cache_dir, progress or _Silent())
    if out is not None:
        evaluation.save(out)
    return evaluation


@dataclass(frozen=True)
class Wanted:
    """Settings as the user gave them; None if the default depends on the models."""

    limit: int | None
    context: int | None
    stride: int | None
    dtype: str | None
    batch_tokens: int
    device: torch.device
    harness: HarnessArguments = NO_ARGUMENTS

    def __post_init__(self) -> None:
        for name in ("limit", "context", "stride", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TaskError(f"{name}: must be a whole number of at least 1, got {value}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TaskError(f"dtype: {self.dtype!r} is not known; allowed: {', '.join(DTYPES)}")

    def settle(self, opened: Mapping[str, LanguageModel], tasks: Sequence[Task], journal: Journal) -> Settings:
        """Return the settings with all defaults filled in."""
        context, stride = self._lengths(opened)
        kinds = {task.kind for task in tasks}
        if self.dtype is not None:
            formats = given_format(self.dtype)
        else:
            config = next(iter(opened.values())).config
            formats = choose_formats(config, self.device, kinds, journal.notes.get("text dtype"))
            if "text" in kinds:
                journal.note("text dtype", formats.text)
        return Settings(self.limit, context, stride, formats, self.batch_tokens, self.device)

    def _lengths(self, opened: Mapping[str, LanguageModel]) -> tuple[int, int]:
        """Return context and stride, in tokens."""
        limits = {name: model.positions for name, model in opened.items() if model.positions is not None}
        context = min([CONTEXT, *limits.values()]) if self.context is None else self.context
        for name, most in limits.items():
            if context > most:
                raise TaskError(f"context: {context} tokens, and {name} can see {most} at once; give at most {most}")
        longest = max(len(model.tokenizer.prefix) for model in opened.values())
        if context <= longest:
            raise TaskError(f"context: {context} tokens leave no room after the {longest} that begin every text")
        stride = max(1, context // 2) if self.stride is None else self.stride
        if stride > context:
            raise TaskError(f"stride: {stride} tokens, more than the context of {context}; give at most {context}")
        return context, stride


def _measure(
    roster: Roster, tasks: Sequence[Task], wanted: Wanted, out: Path | None, cache_dir: Path | None, progress: Progress
) -> Evaluation:
    """Open models and tasks, score them, and assemble the result."""
    started = time.monotonic()
    with ExitStack() as stack:
        tokenizers: dict[str, Tokenizer] = {}
        opened = {
            entry.name: _opened(entry.reference, stack, tokenizers, roster, tasks, cache_dir)
            for entry in roster.entries
        }
        journal = stack.enter_context(Journal(None if out is None else journal_path(out)))
        settings = wanted.settle(opened, tasks, journal)
        check_routed(opened.values(), tasks)
        harness = open_harness(tasks, wanted.harness)
        scorer = Scorer(settings, journal, harness, progress.scoring)
        outcomes, infos = _score(scorer, roster, opened, tasks, progress)
    return Evaluation(
        models=infos,
        tasks={task.name: _task_info(task, roster, harness, outcomes) for task in tasks},
        outcomes=outcomes,
        base=roster.base,
        experts=roster.experts,
        settings=_shown(settings, tasks) | ({"lm_eval": wanted.harness.to_json()} if wanted.harness else {}),
        versions=_versions(harness),
        hardware={
            "device": str(settings.device),
            "processor": _processor(settings.device),
            "threads": torch.get_num_threads(),
        },
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        items_file=None if out is None else journal_path(out).name,
        warnings=tuple(_warnings(opened, tasks)),
    )


def _opened(
    reference: Reference,
    stack: ExitStack,
    tokenizers: dict[str, Tokenizer],
    roster: Roster,
    tasks: Sequence[Task],
    cache_dir: Path | None,
) -> LanguageModel:
    """Open a model, or several tasks with what chooses among them."""
    routed = routed_name(reference)
    if routed is None:
        return open_model(open_source(reference, stack, cache_dir=cache_dir), tokenizers)
    return open_routed(*routed, roster.names_of([task.name for task in tasks]), tokenizers, cache_dir=cache_dir)


def _score(
    scorer: Scorer, roster: Roster, opened: Mapping[str, LanguageModel], tasks: Sequence[Task], progress: Progress
) -> tuple[dict[str, dict[str, Outcome]], dict[str, ModelInfo]]:
    """Load one model after another and score it on all tasks."""
    # tokenise all tasks first, so that a task that does not suit a model is refused before the first model is loaded
    jobs = {name: [scorer.job(model, task) for task in tasks] for name, model in opened.items()}
    outcomes: dict[str, dict[str, Outcome]] = {}
    infos: dict[str, ModelInfo] = {}
    for number, entry in enumerate(roster.entries):
        name, model = entry.name, opened[entry.name]
        if scorer.pending(jobs[name]):
            progress.loading(name, number, len(roster.entries))
        found = _score_model(scorer, name, model, jobs[name])
        if found.failed is None:
            outcomes[name] = {task.name: found.outcomes[task.name] for task in tasks}
        infos[name] = ModelInfo(
            reference=model.source.reference,
            kind=model.source.kind,
            role=entry.role,
            hash=model.source.hash,
            tokenizer=model.tokenizer.hash,
            parameters=found.parameters,
            seconds={name: round(seconds, 3) for name, seconds in found.seconds.items()},
            peak_memory=peak_memory(),
            failed=found.failed,
            told=dict(model.told) if isinstance(model, _CHOOSING) else None,
        )
    return outcomes, infos


@dataclass
class _Scored:
    """Results of scoring one model."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"load": 0.0, "score": 0.0})
    parameters: int | None = None
    failed: str | None = None


def _score_model(scorer: Scorer, name: str, model: LanguageModel, jobs: Sequence[Job]) -> _Scored:
    """Read a model once, and score it in each dtype that its tasks need."""
    found = _Scored()
    tensors: Mapping[str, Tensor] | None = None
    groups = {dtype: [job for job in jobs if job.dtype == dtype] for dtype in dict.fromkeys(job.dtype for job in jobs)}
    last = [dtype for dtype, own in groups.items() if scorer.pending(own)][-1:]
    for dtype, own in groups.items():
        begin = time.monotonic()
        loaded = None
        if scorer.pending(own):
            try:
                tensors = model.source.read() if tensors is None else tensors
                loaded = model.load(tensors, getattr(torch, dtype), scorer.settings.device)
            except MergeError as error:
                # continue with the other models
                found.failed = str(error)
                return found
            found.parameters = loaded.num_parameters()
            if [dtype] == last:
                tensors = None
        ready = time.monotonic()
        found.outcomes |= scorer.run(name, model, loaded, own)
        found.seconds["load"] += ready - begin
        found.seconds["score"] += time.monotonic() - ready
    return found


def _check_out(out: Path) -> None:
    """Check that the results can be written to the target, before anything is measured."""
    try:
        if out.is_dir():
            raise OutputError(f"{out}: is a folder; give the name of a file")
        if not out.parent.is_dir():
            raise OutputError(f"{out}: there is no folder {out.parent}; make it first")
        # a broken link also belongs to the user
        if not os.path.lexists(out):
            return
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out}: cannot be written: {os_reason(error)}") from None
    try:
        ours = read_object(out).get("kind") == "evaluation"
    except CheckpointError:
        ours = False
    if not ours:
        raise OutputError(f"{out}: exists and is not an evaluation by merganser; choose another name")


def _task_info(
    task: Task, roster: Roster, harness: Harness | None, outcomes: Mapping[str, Mapping[str, Outcome]]
) -> TaskInfo:
    scored = [own[task.name] for own in outcomes.values() if own[task.name].metrics]
    # the metrics of lm-eval are known only from its results
    first = scored[0] if scored else Outcome()
    metric = next(iter(first.metrics), None)
    role: Literal["domain", "retained"] | None = None
    if roster.experts:
        role = "domain" if task.name in roster.experts else "retained"
    return TaskInfo(
        kind=task.kind,
        source=task.source,
        hash=harness.hash(task) if harness is not None and isinstance(task, HarnessTask) else task.hash,
        role=role,
        metric=metric,
        higher_is_better=first.higher_is_better.get(metric, True) if metric else True,
        metrics=tuple(first.metrics),
        items=first.items,
        unit=task.unit,
    )


def _shown(settings: Settings, tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "limit": settings.limit,
        "context": settings.context,
        "stride": settings.stride,
        "dtype": settings.formats.shown({task.kind for task in tasks}),
        "dtype_reason": settings.formats.reason,
        "batch_tokens": settings.batch_tokens,
    }


def _warnings(opened: Mapping[str, LanguageModel], tasks: Sequence[Task]) -> list[str]:
    warnings = [note for model in opened.values() for note in model.source.notes]
    if len({model.tokenizer.hash for model in opened.values()}) > 1 and any(isinstance(t, TextTask) for t in tasks):
        warnings.append(
            "the models have different tokenizers: windows of a text differ, so that differences and shares on it are "
            "not paired, unless it consists of several documents"
        )
    for task in tasks:
        if isinstance(task, ChoiceTask) and glued(task):
            warnings.append(
                f"{task.source}: no choice begins with a space, and no context ends in one: choices are appended "
                "unchanged; write the space at the beginning of the choices if there should be one"
            )
    return warnings


def _versions(harness: Harness | None) -> dict[str, str | None]:
    import transformers

    return {
        "merganser": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lm_eval": None if harness is None else harness.version,
    }


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
