"""The page of `auto`: what to use, what was tried, and the held-out test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...search.auto.choice import FIGURES, Choice, TriedRecipe
from ...search.auto.choice import Figure as Measured
from ...search.stored import StoredEnd, StoredItems
from ...wording import plural, time_text
from ..blocks import Block, Cell, Code, Figure, List, Number, Paragraph, Section, Table
from ..palette import COLOURS, cut, escape, layout
from .figures import history_figures, parallel_figure
from .heat import heat_section
from .sections import compared

__all__ = ["choice_sections", "choice_summary"]

_SOURCE = "result.json"


def choice_summary(choice: Choice) -> str:
    """Return what was tried, in one line."""
    seconds = sum(tried.seconds for tried in choice.tried) + sum(trial.seconds for trial in choice.around)
    return f"{choice.what_was_tried} · auto · {time_text(seconds)} in merging and scoring"


def choice_sections(choice: Choice, items: Sequence[StoredItems]) -> list[Section]:
    """Return the sections.

    Args:
        choice: What `auto` found.
        items: Its table of items.
    """
    found = [_verdict(choice), Section("What was tried", [*_tried_figure(choice), _tried(choice)])]
    study = choice.study
    if choice.around:
        # recipes of the portfolio have no free values
        free = replace(study, trials=tuple(trial for trial in study.trials if trial.settings))
        around = [*history_figures(study), *parallel_figure(free)]
        found.append(Section("Around the best of them", [Paragraph(_around_text(choice)), *around]))
    return [*found, heat_section(study, items)] if items else found


def _verdict(choice: Choice) -> Section:
    blocks: list[Block] = [Paragraph(text) for text in _sentences(choice)]
    blocks.append(_ends(choice))
    if choice.merged is not None:
        blocks.append(Code(f"merganser merge {choice.folder / 'winner.yaml'} OUT"))
    if choice.notes:
        blocks.append(List("notes", choice.notes))
    return Section("What to use", blocks)


def _sentences(choice: Choice) -> list[str]:
    chosen = f"{choice.winner}, chosen from {plural(choice.chosen_from, 'recipe')}"
    worse = "" if choice.merged is not None else ", is worse, so nothing was merged"
    lines = [
        f"Take {choice.what_to_use}: {chosen}{worse}.",
        "Kept is the share of the gain of the best model of each task over the base that is still there: "
        f"{choice.domains_text}. A model alone keeps 1 of its own task.",
        f"Measured on {plural(choice.held_out, 'item')} that nothing was chosen on; ± is one standard error. What was chosen "
        "from many looks better on the items that chose it than it is, so only these figures count.",
        *compared(choice.study),
    ]
    return [*lines, choice.advice] if choice.advice else lines


def _columns(all_figures: Sequence[Mapping[str, Measured]]) -> list[tuple[str, str]]:
    return [(name, said) for name, said in FIGURES.items() if any(name in figures for figures in all_figures)]


def _ends(choice: Choice) -> Table:
    columns = _columns([*choice.kept.values()])
    head = ["", "is", *(said for _, said in columns), "the winner keeps more by (95 % interval)"]
    rows = [_end(choice, i, end, [name for name, _ in columns]) for i, end in enumerate(choice.ends)]
    return Table(head, rows, f"{_SOURCE}: ends, kept", "on items that nothing was chosen on")


def _end(choice: Choice, i: int, end: StoredEnd, names: Sequence[str]) -> list[Cell]:
    if end.values is None:
        return [end.name, end.role, f"failed: {end.failed}", *[""] * len(names)]
    cells: list[Cell] = [end.name, end.role, *_cells(choice.kept.get(end.name, {}), names, f"kept.{end.name}")]
    if not end.better:
        return [*cells, ""]
    gap = end.better[0]
    span = "" if gap.interval is None else f" ({gap.interval[0]:+.3f} to {gap.interval[1]:+.3f})"
    return [*cells, Number(gap.value, f"{gap.value:+.3f}{span}", f"ends[{i}].winner_better_by[0].value")]


def _cells(figures: Mapping[str, Measured], names: Sequence[str], place: str) -> list[Cell]:
    cells: list[Cell] = []
    for name in names:
        if name not in figures:
            cells.append("")
            continue
        value, stderr = figures[name]
        error = "" if stderr is None else f" ± {stderr:.3f}"
        cells.append(Number(value, f"{value:.3f}{error}", f"{place}.{name.replace('/', '.')}.value"))
    return cells


def _ordered(choice: Choice) -> list[tuple[int, TriedRecipe]]:
    """Return the recipes, the best first, those that were ended early and those that failed behind."""
    return sorted(
        enumerate(choice.tried),
        key=lambda each: (each[1].value is None, each[1].stopped, -(each[1].value or 0.0), each[0]),
    )


def _tried(choice: Choice) -> Table:
    columns = _columns([tried.figures for tried in choice.tried])
    names = [name for name, _ in columns]
    rows: list[list[Cell]] = []
    for i, tried in _ordered(choice):
        said = "failed: " + tried.failed if tried.failed else "ended early" if tried.stopped else ""
        rows.append(
            [
                tried.name,
                *_cells(tried.figures, names, f"tried[{i}].figures"),
                Number(tried.items, str(tried.items), f"tried[{i}].items"),
                said,
                Number(tried.seconds, time_text(tried.seconds), f"tried[{i}].seconds"),
            ]
        )
    caption = "on the items that chose; those ended early were scored on fewer, and their figures are of these"
    return Table(["recipe", *(said for _, said in columns), "items", "", "took"], rows, f"{_SOURCE}: tried", caption)


def _tried_figure(choice: Choice) -> list[Block]:
    """Return what each recipe keeps, with its standard error."""
    order = [tried for _, tried in _ordered(choice) if choice.objective in tried.figures]
    if len(order) < 2:
        return []
    whole, early = ([tried for tried in order if tried.stopped == stopped] for stopped in (False, True))
    data = [
        _kept_points("scored on all items", whole, choice.objective, color=COLOURS[0], symbol="circle", size=9),
        _kept_points("ended early", early, choice.objective, color=COLOURS[6], symbol="circle-open", size=8),
    ]
    data = [trace for trace in data if trace["x"]]
    height = 130 + 24 * len(order)
    drawn = layout(
        height,
        margin={"l": 130, "r": 12, "t": 30, "b": 70},
        showlegend=len(data) > 1,
        legend={"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"},
        xaxis={"fixedrange": True, "title": {"text": "kept, mean of the tasks"}},
        yaxis={
            "fixedrange": True,
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [escape(cut(tried.name)) for tried in reversed(order)],
            "tickfont": {"size": 11},
        },
    )
    lines = [f"  {tried.name}: {tried.figures[choice.objective][0]:.4f}" for tried in order]
    return [Figure("what the recipes keep, on the items that chose", data, drawn, height, lines, f"{_SOURCE}: tried[]")]


def _kept_points(label: str, recipes: Sequence[TriedRecipe], objective: str, **marker: Any) -> dict[str, Any]:
    """Return the trace of what some recipes keep."""
    measured = [tried.figures[objective] for tried in recipes]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label,
        "x": [value for value, _ in measured],
        "y": [escape(cut(tried.name)) for tried in recipes],
        "error_x": {"type": "data", "array": [error or 0.0 for _, error in measured], "thickness": 1, "width": 0},
        "marker": marker,
        "hovertemplate": "%{y}: %{x:.4f}<extra></extra>",
    }


def _around_text(choice: Choice) -> str:
    return (
        "After the recipes, factors by depth were searched around the best of them. The chart has all of them in order, the "
        f"recipes first; {choice.winner} is the best."
    )
