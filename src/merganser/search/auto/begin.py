"""What `auto` settles before anything is tried: what it improves, and how many items it scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import MergeError, OutputError, TaskError
from ...evaluation.scoring.tasks import Task
from ...jsonfile import os_reason
from ..folder import Folder
from ..scoring.bench import Bench, Failed, Model
from ..scoring.judge import ItemJudge
from ..scoring.objectives import Figures, parse_objectives
from ..trials import Progress
from .budget import keep_waves

__all__ = [
    "check_experts",
    "check_merged",
    "fields_of",
    "notes_of_same",
    "notes_of_useless",
    "open_judge",
    "refuse_same",
    "remove_merged",
    "settle_waves",
]

_SURE = 3.0
"""Standard errors by which a model must beat the base on a task: more than for an expert that is named, since the best of
several models is taken, and a share of a gain that is noise has no meaning."""

_BESIDE = 0.2
"""Share of its largest gain that a model must gain on another task, for that to be its field, too. Texts of no model's field
are often a little easier after any training; shares of so small a gain are so noisy that they would decide the mean."""


def check_experts(base: str, experts: Sequence[str], out: str) -> None:
    """Refuse models that nothing can be made of, before they are opened.

    Raises:
        TaskError: There are fewer than two experts, or one is listed twice.
    """
    if len(experts) < 2:
        # the last argument is the folder, which is easily left out
        named = f" ({', '.join(experts)}; {out}, the last one, is the folder of the result)" if experts else ""
        raise TaskError(f"auto: merges two or more experts of one base, got {len(experts)}{named}")
    for number, expert in enumerate(experts):
        if expert == base:
            raise TaskError(f"auto: {expert} is the base, and is listed among the experts, too; leave it out there")
        if expert in experts[:number]:
            raise TaskError(f"auto: {expert} is listed twice among the experts; leave one out")


def notes_of_same(models: Sequence[Model]) -> list[str]:
    """Return what to tell the user about models with the same weights.

    Args:
        models: The base and the experts.

    Raises:
        TaskError: All experts are the base.
    """
    base, *experts = models
    if all(expert.key == base.key for expert in experts):
        raise TaskError(f"auto: all experts have the weights of {base.name}, the base, so there is nothing to merge")
    first: dict[str, str] = {base.key: f"{base.name}, the base"}
    notes = []
    for expert in experts:
        if expert.key in first:
            notes.append(
                f"{expert.name} has the weights of {first[expert.key]}, and counts in every merge; leave it out"
            )
        first.setdefault(expert.key, expert.name)
    return notes


def notes_of_useless(models: Sequence[Model], domains: Mapping[str, str]) -> list[str]:
    """Return what to tell the user about experts whose field no task measures.

    Args:
        models: The base and the experts.
        domains: The best model of each task whose gain over the base counts.
    """
    useful = {model.key for model in models if model.name in domains.values()}
    return [
        f"{model.name} is the best at no task, so nothing of its own is measured, and merges may lose it: give a task of its "
        "field, or leave it out"
        for model in models[1:]
        if model.key not in useful
    ]


def open_judge(bench: Bench, models: Sequence[Model], progress: Progress) -> tuple[ItemJudge, dict[str, str]]:
    """Return a judge of what is recovered of the best model of each task, and the names of these models.

    Args:
        bench: Scores the models.
        models: The base and the experts.
        progress: Is told which model is scored.

    Raises:
        TaskError: A model cannot be scored, or none beats the base on any task.
    """
    base, *experts = models
    waves = bench.table.waves
    best: dict[str, Model] = {}
    try:
        figures = bench.score_all(models, waves, progress.measuring)
    except Failed as error:
        raise TaskError(str(error)) from error
    for task, split in bench.table.splits.items():
        sign = 1.0 if split.higher[split.main] else -1.0
        best[task] = max(experts, key=lambda m: sign * figures[m.name][f"{task}/{split.main}"].value)
    mains = {task: (split.main, split.higher[split.main]) for task, split in bench.table.splits.items()}
    fields, notes = fields_of(best, base, figures, mains)
    judge = ItemJudge(bench, base, fields, stopping=True)
    judge.notes += notes
    try:
        judge.measure_references(_SURE)
    except TaskError:
        raise TaskError(
            "auto: on none of these tasks one of the models beats the base by three standard errors, so there is nothing "
            f"to keep; give more items, or tasks that the models were trained for. {'; '.join(judge.notes)}"
        ) from None
    judge.objectives = parse_objectives((), judge.known, judge.default)
    counted = {name.partition("/")[2] for name in judge.known if name.startswith("recovered/")}
    return judge, {task: model.name for task, model in best.items() if task in counted}


def fields_of(
    best: Mapping[str, Model], base: Model, figures: Mapping[str, Figures], mains: Mapping[str, tuple[str, bool]]
) -> tuple[dict[str, Model], list[str]]:
    """Return the tasks on which the best model gains much, beside its other tasks, and what to tell the user about the rest.

    Gains are compared among tasks of one metric: of metrics where less is better, such as bits, as shares of the base's figure.

    Args:
        best: The best model of each task.
        base: The base.
        figures: Figures of each model, by its name and `TASK/METRIC`.
        mains: Main metric of each task, and whether higher is better.
    """
    gains: dict[str, float] = {}
    for task, model in best.items():
        metric, higher = mains[task]
        own, origin = (figures[each.name][f"{task}/{metric}"].value for each in (model, base))
        gains[task] = own - origin if higher else (origin - own) / (abs(origin) or 1.0)
    fields, notes = {}, []
    for task, model in best.items():
        others = [other for other in best if best[other].key == model.key and mains[other] == mains[task]]
        most = max(others, key=gains.__getitem__)
        if gains[task] > 0 and gains[task] < _BESIDE * gains[most]:
            notes.append(
                f"{task} does not count as a domain: {model.name}, the best at it, gains {gains[task]:.1%} there and "
                f"{gains[most]:.1%} at {most}"
            )
        else:
            fields[task] = model
    return fields, notes


def settle_waves(
    folder: Folder,
    given: dict[str, Any],
    bench: Bench,
    models: Sequence[Model],
    minutes: float,
    progress: Progress,
) -> int:
    """Return how many waves of items are scored, as at the first call of the folder, which is begun with it."""
    known = folder.settings() or {}
    waves, note = known.get("waves of items"), None
    folder.check({**given, "waves of items": waves} if known else given)
    if waves is None:
        try:
            waves, note = keep_waves(bench, models, minutes)
        except Failed as error:
            raise TaskError(str(error)) from error
    folder.begin({**given, "waves of items": waves})
    of = len(bench.table.waves)
    if waves < of:
        progress.note(
            f"{'a quarter' if waves == 1 else 'half'} of the items is scored, since all would take more than half of the "
            "minutes; with more minutes, and another folder, all are"
        )
    if note:
        progress.note(note)
    return int(waves)


def refuse_same(texts: Mapping[str, Path], tasks: Sequence[Task]) -> None:
    """Refuse a text that is both calibrated on and scored.

    Raises:
        TaskError: There is one.
    """
    sources = {Path(task.source).expanduser().absolute(): task.name for task in tasks}
    for name, path in texts.items():
        if path in sources:
            raise TaskError(
                f"data: {path} is the text of {name} and the task {sources[path]}; a merge that was calibrated on what it "
                "is scored on is not tested by it: give other texts, or leave the tasks out, so that it is divided"
            )


def remove_merged(folder: Folder) -> bool:
    """Remove the merge of an earlier call, which `check_merged` found to be ours; return whether there was one."""
    from ...engine.output.ownership import survey

    path = folder.path / "merged"
    if not path.exists():
        return False
    try:
        survey(path).remove()
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {os_reason(error)}") from None
    return True


def check_merged(folder: Folder) -> None:
    """Refuse a folder `merged` that is not ours, before anything is tried."""
    from ...engine.output.staging import check_target

    try:
        check_target(folder.path / "merged", overwrite=True)
    except MergeError as error:
        raise OutputError(str(error)) from error
