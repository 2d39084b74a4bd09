"""Which items tell trials apart: every trial's score on every item, against what the others score there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...search.stored import StoredItems, StoredStudy
from ..blocks import Block, Figure, Paragraph, Section
from ..palette import escape, layout

__all__ = ["heat_section"]

_MOST_CELLS = 30_000
"""Cells of all tasks together; a page stays below 2 MB with them."""
_MOST_COLUMNS = 240
_STEPS = 100
_BITS = "bits per byte"
"""Kind of the scores of texts, which are kept with the opposite sign."""


def heat_section(study: StoredStudy, items: Sequence[StoredItems]) -> Section:
    """Return the section on items.

    Args:
        study: The search.
        items: Its table of items, by task.
    """
    blocks: list[Block] = [
        Paragraph(
            "A row is a trial, in the order of the trials, with the models that were merged below; a column is an item, the hardest at the "
            "left. Blue: the trial does better on this item than the mean of all; red: worse; empty: not scored, because "
            "the trial was ended early. Items without colour say the same of all trials."
        )
    ]
    blocks += [_heat(study, each, _MOST_CELLS // len(items)) for each in items]
    return Section("Which items", blocks)


@dataclass(frozen=True, slots=True)
class _Bins:
    """The scores of a task as they are drawn: items from hard to easy, neighbours in groups where there are many.

    Args:
        rows: Names of the models that are shown.
        said: A sentence about those that are not.
        groups: The items of each column.
        steps: How far each model is from the mean in each column, in steps of the scale from -100 to 100; None where nothing
            is known.
        scale: The distance of 100 steps.
        mean: The mean score of each item.
        apart: The distance of each model from it, NaN where it is not known.
    """

    rows: list[str]
    said: str
    groups: list[NDArray[np.int64]]
    steps: list[list[int | None]]
    scale: float
    mean: NDArray[np.float64]
    apart: NDArray[np.float64]


def _binned(study: StoredStudy, items: StoredItems, most: int) -> _Bins:
    rows, said = _rows(study, items, most)
    at = {name: i for i, name in enumerate(items.models)}
    scores = items.scores[[at[name] for name in rows]]
    seen = np.isfinite(scores)
    count = np.maximum(seen.sum(0), 1)
    mean = np.where(seen, scores, 0.0).sum(0) / count
    order = np.argsort(mean, kind="stable")
    columns = min(len(order), _MOST_COLUMNS, max(most // max(len(rows), 1), 1))
    groups = np.array_split(order, columns)
    apart = np.where(seen, scores - mean, np.nan)
    binned = np.stack([_mean(apart[:, group]) for group in groups], 1)
    end = float(np.nanquantile(np.abs(binned), 0.98)) if np.isfinite(binned).any() else 0.0
    scale = end or 1.0
    # whole steps: a third of the size, and the eye sees no more
    steps = np.clip(np.nan_to_num(binned / scale * _STEPS), -_STEPS, _STEPS).round().astype(int)
    cells = [
        [int(step) if known else None for step, known in zip(row, found, strict=True)]
        for row, found in zip(steps, np.isfinite(binned), strict=True)
    ]
    return _Bins(rows=rows, said=said, groups=groups, steps=cells, scale=scale, mean=mean, apart=apart)


def _heat(study: StoredStudy, items: StoredItems, most: int) -> Figure:
    bins = _binned(study, items, most)
    names = [
        f"items {_numbers(items, group)}: mean {_number(items, float(bins.mean[group].mean()))}"
        for group in bins.groups
    ]
    height = 130 + max(9 * len(bins.rows), 60)
    unit = {"correct": "share of right answers", _BITS: f"{_BITS}, fewer are better"}.get(items.score, items.score)
    figure = {
        "type": "heatmap",
        "x": [f"{i + 1}. {name}" for i, name in enumerate(names)],
        "y": [escape(name) for name in bins.rows],
        "z": bins.steps,
        "zmin": -_STEPS,
        "zmax": _STEPS,
        "colorscale": [[0, "#c8553d"], [0.5, "#e8e8e8"], [1, "#2f6db3"]],
        "showscale": False,
        "hovertemplate": "<b>%{y}</b><br>%{x}<br>%{z} % of the full colour<extra></extra>",
    }
    drawn = layout(
        height,
        margin={"l": 80, "r": 12, "t": 30, "b": 50},
        xaxis={
            "title": {"text": "items, from hard to easy"},
            "fixedrange": True,
            "showgrid": False,
            "showticklabels": False,
        },
        yaxis={
            "fixedrange": True,
            "autorange": "reversed",
            "type": "category",
            "tickfont": {"size": 9},
            "showgrid": False,
        },
    )
    count, scale = len(bins.mean), _number(items, bins.scale, plain=True)
    grouped = "" if len(bins.groups) == count else f", {count} in {len(bins.groups)} groups"
    title = f"{items.task}: {unit}; full colour is {scale} from the mean{grouped}{bins.said}"
    telling = np.nanmean(np.abs(bins.apart), 0)
    first = ", ".join(str(items.items[i]) for i in np.argsort(-telling, kind="stable")[:10])
    lines = [f"  items that tell trials apart most: {first}"]
    return Figure(title, [figure], drawn, height, lines, "items.jsonl")


def _rows(study: StoredStudy, items: StoredItems, most: int) -> tuple[list[str], str]:
    """Return the names of the models that are shown, and a sentence about those that are not."""
    known = set(items.models)
    trials = [t for t in study.trials if t.name in known and t.same_as is None]
    others = [name for name in items.models if name not in {t.name for t in study.trials}]
    room = max(min(most // 60, 150) - len(others), 1)
    if len(trials) <= room:
        return [*(t.name for t in trials), *others], ""
    sign = 1.0 if study.objectives[0][1] == "maximize" else -1.0
    best = sorted(trials, key=lambda t: (not t.whole, -sign * t.values[0] if t.values else 0.0))[:room]
    kept = {t.number for t in best}
    return [*(t.name for t in trials if t.number in kept), *others], f"; the best {room} of {len(trials)} trials"


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of what is known in each row, NaN where nothing is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(1)
    found: NDArray[np.float64] = np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)
    return found


def _numbers(items: StoredItems, group: NDArray[np.int64]) -> str:
    numbers = [items.items[i] for i in group]
    return ", ".join(map(str, numbers)) if len(numbers) <= 4 else f"{len(numbers)}: {numbers[0]}, {numbers[1]}, ..."


def _number(items: StoredItems, value: float, *, plain: bool = False) -> str:
    return f"{-value:.3g}" if items.score == _BITS and not plain else f"{value:.2g}"
