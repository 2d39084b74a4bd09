"""The sections of the page of a search, in order."""

from __future__ import annotations

from collections.abc import Sequence

from ...search.stored import StoredEnd, StoredItems, StoredStudy, StoredTrial
from ...wording import plural, setting_text, time_text
from ..blocks import Block, Cell, Code, List, Number, Paragraph, Section, Table
from .figures import front_figures, history_figures, importance_figure, parallel_figure, value_names
from .heat import heat_section

__all__ = ["compared", "study_sections", "study_summary"]

_MOST_ROWS = 100
_SOURCE = "result.json"


def study_summary(study: StoredStudy) -> str:
    """Return what was searched, in one line."""
    seconds = sum(trial.seconds for trial in study.trials)
    objectives = ", ".join(f"{name} ({_better(direction)} is better)" for name, direction in study.objectives)
    return f"{plural(len(study.trials), 'trial')} · {study.sampler} · {objectives} · {time_text(seconds)} in trials"


def study_sections(study: StoredStudy, items: Sequence[StoredItems]) -> list[Section]:
    """Return the sections.

    Args:
        study: The search.
        items: Its table of items.
    """
    found = [_verdict(study), Section("How it went", [*history_figures(study), *front_figures(study), *_failed(study)])]
    values = [*parallel_figure(study), *importance_figure(study)]
    if values:
        found.append(Section("Which values", values))
    if items:
        found.append(heat_section(study, items))
    return [*found, Section("All trials", [_trials(study)])]


def _better(direction: str) -> str:
    return "higher" if direction == "maximize" else "lower"


def _verdict(study: StoredStudy) -> Section:
    blocks: list[Block] = [Paragraph(text) for text in _sentences(study)]
    if study.ends:
        blocks.append(_ends(study))
    by_number = {trial.number: trial for trial in study.trials}
    best = [by_number[number] for number in study.front]
    if best:
        blocks.append(_settings(best))
        name = "winner.yaml" if len(study.objectives) == 1 else f"recipes/{best[0].name}.yaml"
        blocks.append(Code(f"merganser merge {study.folder / name} OUT"))
    if study.notes:
        blocks.append(List("notes", study.notes))
    return Section("What was found", blocks)


def _sentences(study: StoredStudy) -> list[str]:
    if not study.front:
        return ["No trial has figures on all items and keeps the bounds, so nothing was found."]
    if len(study.objectives) > 1:
        said = f"{plural(len(study.front), 'trial')} that no other beats in all objectives"
    else:
        said = f"The best is trial {study.front[0] + 1}"
    whole = sum(trial.same_as is None and trial.failed is None for trial in study.trials)
    lines = [
        f"{said}, of {whole} that were scored; as the best of many, it looks better on the items that chose it than it is."
    ]
    if not study.ends:
        return [
            *lines,
            "The search was stopped before the held-out test: nothing was measured on items that no trial saw.",
        ]
    if study.held_out:
        lines.append(f"Measured on {plural(study.held_out, 'item')} that no trial saw; ± is one standard error.")
    else:
        lines.append("Measured by the command that scored the trials, too: nothing was held out.")
    return [*lines, *compared(study)] if len(study.objectives) == 1 else lines


def compared(study: StoredStudy) -> list[str]:
    """Return what the held-out test says of the winner beside the best single model and the average, in sentences."""
    said = [gap.sentence(end.name, end.role) for end, gap in study.against]
    return [f"{text[0].upper()}{text[1:]}." for text in said]


def _ends(study: StoredStudy) -> Table:
    head = ["", "is", *(f"{name} {'↑' if d == 'maximize' else '↓'}" for name, d in study.objectives)]
    first = study.ends[0].name if len(study.objectives) > 1 else "the winner"
    what = f" in {study.objectives[0][0]}" if len(study.objectives) > 1 else ""
    head.append(f"{first} is better by{what}" + (" (95 % interval)" if study.held_out else ""))
    rows = [_end(study, i, end) for i, end in enumerate(study.ends)]
    return Table(head, rows, f"{_SOURCE}: ends", "on items held out" if study.held_out else "measured at the end")


def _end(study: StoredStudy, i: int, end: StoredEnd) -> list[Cell]:
    if end.values is None:
        return [end.name, end.role, f"failed: {end.failed}", *[""] * len(study.objectives)]
    cells: list[Cell] = [end.name, end.role]
    for k, (value, stderr) in enumerate(end.values):
        error = "" if stderr is None else f" ± {stderr:.4f}"
        cells.append(Number(value, f"{value:.4f}{error}", f"ends[{i}].values[{k}].value"))
    if not end.better:
        return [*cells, ""]
    gap = end.better[0]
    span = "" if gap.interval is None else f" ({gap.interval[0]:+.4f} to {gap.interval[1]:+.4f})"
    return [*cells, Number(gap.value, f"{gap.value:+.4f}{span}", f"ends[{i}].winner_better_by[0].value")]


def _settings(best: Sequence[StoredTrial]) -> Table:
    shown = best[:8]
    rows: list[list[Cell]] = [
        [name, *(setting_text(trial.settings.get(name, "")) for trial in shown)] for name in value_names(shown)
    ]
    return Table(["value", *(trial.name for trial in shown)], rows, f"{_SOURCE}: trials[].settings", "what they are")


def _failed(study: StoredStudy) -> list[Block]:
    failed = [f"trial {t.number + 1}: {t.failed}" for t in study.trials if t.failed and t.same_as is None]
    more = [f"and {len(failed) - 8} more"] if len(failed) > 8 else []
    return [List("failed", [*failed[:8], *more])] if failed else []


def _trials(study: StoredStudy) -> Table:
    """Return the trials, or the best of them where there are very many."""
    sign = 1.0 if study.objectives[0][1] == "maximize" else -1.0
    ordered = sorted(
        enumerate(study.trials),
        key=lambda each: (not each[1].whole, -sign * each[1].values[0] if each[1].values else 0.0, each[1].number),
    )
    names = value_names(study.trials)
    rows = [_row(i, trial, study, names) for i, trial in ordered[:_MOST_ROWS]]
    caption = "all trials, the best first" if len(rows) == len(study.trials) else f"the best {len(rows)} trials"
    head = ["trial", *(name for name, _ in study.objectives), "items", "", *names]
    return Table(head, rows, f"{_SOURCE}: trials", caption, folded=True)


def _row(i: int, trial: StoredTrial, study: StoredStudy, names: Sequence[str]) -> list[Cell]:
    values: list[Cell] = [""] * len(study.objectives)
    if trial.values is not None:
        values = [Number(v, f"{v:.4f}", f"trials[{i}].values[{k}]") for k, v in enumerate(trial.values)]
    said = [
        *(["failed"] if trial.failed else []),
        *(["ended early"] if trial.stopped else []),
        *(["misses a bound"] if trial.values is not None and not trial.feasible else []),
        *([f"as trial {trial.same_as + 1}"] if trial.same_as is not None else []),
    ]
    items = Number(trial.items, str(trial.items), f"trials[{i}].items")
    number = Number(trial.number + 1, str(trial.number + 1))
    return [number, *values, items, ", ".join(said), *(setting_text(trial.settings.get(name, "")) for name in names)]
