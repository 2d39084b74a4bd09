"""Figures of a search: its history, its front, the values that were tried, and which of them matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...search.stored import StoredStudy, StoredTrial
from ..blocks import Block, Figure
from ..palette import COLOURS, bounds, cut, escape, layout, ramp

__all__ = ["front_figures", "history_figures", "importance_figure", "parallel_figure", "value_names"]

_MOST_LINES = 80
_MOST_VALUES = 12
_MOST_FIGURES = 3
_BAR = 40
_KINDS = (
    ("scored on all items", {"color": COLOURS[0], "symbol": "circle", "size": 8}),
    ("ended early", {"color": COLOURS[6], "symbol": "circle-open", "size": 7}),
    ("misses a bound", {"color": COLOURS[1], "symbol": "x", "size": 8}),
)
_SOURCE = "result.json: trials[]"


def _kind(trial: StoredTrial) -> int:
    return 1 if trial.stopped else 0 if trial.feasible else 2


def _said(trial: StoredTrial, study: StoredStudy) -> str:
    """Return the hover text of a trial."""
    values = "".join(
        f"<br>{escape(cut(name))}: {value:.5g}"
        for (name, _), value in zip(study.objectives, trial.values or (), strict=True)
    )
    settings = "".join(
        f"<br>{escape(cut(name))} = {escape(f'{v:.4g}' if isinstance(v, float) else cut(str(v)))}"
        for name, v in [*trial.settings.items()][:_MOST_VALUES]
    )
    return f"<b>{escape(_title(trial))}</b>{values}{settings}"


def _title(trial: StoredTrial) -> str:
    """Return what a trial is called: by its number, or by the name of its recipe."""
    number = trial.name.removeprefix("trial-")
    return f"trial {int(number)}" if number.isdecimal() else cut(trial.name)


def history_figures(study: StoredStudy) -> list[Block]:
    """Return a figure of the score of each trial, in the order of the trials, for each objective."""
    found: list[Block] = []
    for k, (name, direction) in enumerate(study.objectives[:_MOST_FIGURES]):
        trials = [t for t in study.trials if t.values is not None]
        if trials:
            found.append(_history(study, trials, k, name, 1.0 if direction == "maximize" else -1.0))
    return found


def _history(study: StoredStudy, trials: Sequence[StoredTrial], k: int, name: str, sign: float) -> Figure:
    steps: list[tuple[int, float]] = []
    for trial in trials:
        if trial.whole and trial.values and (not steps or sign * trial.values[k] > sign * steps[-1][1]):
            steps.append((trial.number + 1, trial.values[k]))
    data = [*_points(study, trials, k), *_best_so_far(steps, study.trials[-1].number + 1)]
    lines = [f"  trial {x}: {y:.5g}" for x, y in steps[-8:]]
    axis: dict[str, Any] = {"fixedrange": True}
    # without this, very bad trials would compress the range of all others
    found = bounds([t.values[k] for t in trials if t.values])
    outside = ""
    if found is not None:
        axis["range"] = [*found]
        count = sum(not found[0] <= t.values[k] <= found[1] for t in trials if t.values)
        outside = f"; outside the chart: {count}"
    drawn = layout(
        380,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        xaxis={"title": {"text": "trial"}, "fixedrange": True},
        yaxis=axis,
    )
    better = "higher" if sign > 0 else "lower"
    return Figure(f"{name} ({better} is better){outside}", data, drawn, 380, lines, _SOURCE)


def _points(study: StoredStudy, trials: Sequence[StoredTrial], k: int) -> list[dict[str, Any]]:
    """Return a trace of each kind of trials, with their values of the objective number k."""
    data: list[dict[str, Any]] = []
    for kind, (label, mark) in enumerate(_KINDS):
        own = [trial for trial in trials if _kind(trial) == kind and trial.values]
        if own:
            errors = [(t.stderr[k] if k < len(t.stderr) else None) or 0.0 for t in own]
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": label,
                    "x": [t.number + 1 for t in own],
                    "y": [t.values[k] for t in own if t.values],
                    "error_y": {"type": "data", "array": errors, "color": "#88888866", "thickness": 1, "width": 0},
                    "marker": mark,
                    "text": [_said(t, study) for t in own],
                    "hoverinfo": "text",
                }
            )
    return data


def _best_so_far(steps: Sequence[tuple[int, float]], last: int) -> list[dict[str, Any]]:
    """Return a trace of the best value until each trial; `steps` are the trials that were better than all before."""
    if not steps:
        return []
    ends = [*steps, (last, steps[-1][1])]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [x for x, _ in ends],
            "y": [y for _, y in ends],
            "line": {"shape": "hv", "color": COLOURS[2], "width": 2},
            "hoverinfo": "skip",
        }
    ]


def front_figures(study: StoredStudy) -> list[Block]:
    """Return two objectives against each other: the first against each of the next; nothing with one objective."""
    found: list[Block] = []
    whole = [trial for trial in study.trials if trial.whole and trial.values]
    front = set(study.front)
    if not whole:
        return []
    for k, (other, towards) in enumerate(study.objectives[1 : 1 + _MOST_FIGURES], start=1):
        first, direction = study.objectives[0]
        data = []
        for label, inside, colour, size in (("front", True, COLOURS[1], 11), ("others", False, COLOURS[6], 7)):
            own = sorted((t for t in whole if (t.number in front) == inside), key=lambda t: t.values or ())
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if inside and len(study.objectives) == 2 else "markers",
                    "name": label,
                    "x": [t.values[0] for t in own if t.values],
                    "y": [t.values[k] for t in own if t.values],
                    "marker": {"color": colour, "size": size},
                    "line": {"color": colour, "width": 1},
                    "text": [_said(t, study) for t in own],
                    "hoverinfo": "text",
                }
            )
        drawn = layout(
            400,
            showlegend=True,
            legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
            xaxis={"title": {"text": escape(cut(first))}, "fixedrange": True},
            yaxis={"title": {"text": escape(cut(other))}, "fixedrange": True},
        )
        where = f"{'up' if towards == 'maximize' else 'down'} and {'right' if direction == 'maximize' else 'left'}"
        lines = [
            f"  trial {t.number + 1}: {', '.join(f'{v:.5g}' for v in t.values or ())}"
            for t in whole
            if t.number in front
        ]
        found.append(Figure(f"{other} against {first} (better: {where})", data, drawn, 400, lines[:20], _SOURCE))
    return found


def parallel_figure(study: StoredStudy) -> list[Block]:
    """Return a figure of the values of each trial as a line from value to value, coloured by its score."""
    trials = [t for t in study.trials if t.values is not None and t.same_as is None and t.feasible]
    names = _shown_values(study, trials)
    if len(trials) < 2 or not names:
        return []
    sign = 1.0 if study.objectives[0][1] == "maximize" else -1.0
    ordered = sorted(trials, key=lambda t: -sign * t.values[0] if t.values else 0.0)[:_MOST_LINES]
    # a scale of what is not used is not a value
    scales = {name: _scale([t.settings[name] for t in trials if name in t.settings]) for name in names}
    labels = _labels(names)
    data = []
    for rank, trial in reversed([*enumerate(ordered)]):
        share = 1 - rank / max(len(ordered) - 1, 1)
        best = trial.number in study.front
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(names) < 2 or best else "lines",
                "x": labels,
                "y": [scales[name].get(_key(trial.settings.get(name))) for name in names],
                "line": {"color": COLOURS[1] if best else ramp(share), "width": 3 if best else 1},
                "opacity": 1 if best else 0.35 + 0.4 * share,
                "text": [_said(trial, study)] * len(names),
                "hoverinfo": "text",
            }
        )
    drawn = layout(
        420,
        margin={"l": 40, "r": 56, "t": 30, "b": 110},
        xaxis={"fixedrange": True, "type": "category", "tickangle": 40, "tickfont": {"size": 10}},
        yaxis={"fixedrange": True, "range": [-0.04, 1.04], "tickvals": [0, 1], "ticktext": ["low", "high"]},
    )
    said = "" if len(ordered) == len(trials) else f" (the best {len(ordered)} of {len(trials)})"
    left = len(value_names(trials)) - len(names)
    said += f"; {left} values that matter less are left out" if left else ""
    title = f"values by trial{said}: from dark (bad) to bright (good), red the best"
    lines = [
        f"  {name}: {_ends_text([t.settings[name] for t in ordered[:10] if name in t.settings])}" for name in names
    ]
    return [Figure(title, data, drawn, 420, ["  in the ten best trials:", *lines], _SOURCE)]


def value_names(trials: Sequence[StoredTrial]) -> list[str]:
    """Return the names of the values that trials have."""
    return [*dict.fromkeys(name for trial in trials for name in trial.settings)]


def _shown_values(study: StoredStudy, trials: Sequence[StoredTrial]) -> list[str]:
    """Return the values that a figure shows: those that matter most, in the order of the recipe, if there are many."""
    if not trials:
        return []
    names = value_names(trials)
    if len(names) <= _MOST_VALUES:
        return names
    shares = next(iter(study.importance.values()), {})
    kept = sorted(names, key=lambda name: -shares.get(name, 0.0))[:_MOST_VALUES]
    return [name for name in names if name in kept]


def _labels(names: Sequence[str], most: int = 18) -> list[str]:
    """Return names without what all begin with, each cut, and none twice."""
    short = [name.removeprefix("parameters.") for name in names]
    half = most // 2
    cuts = [escape(name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}") for name in short]
    return [text if cuts.count(text) == 1 else f"{text} {i + 1}" for i, text in enumerate(cuts)]


def _key(value: object) -> object:
    return value if isinstance(value, int | float | str) else str(value)


def _scale(values: Sequence[object]) -> dict[object, float]:
    """Return the height of each value, from 0 to 1: between the lowest and the highest number, choices evenly."""
    keys = [*dict.fromkeys(_key(value) for value in values)]
    numbers = [key for key in keys if isinstance(key, int | float) and not isinstance(key, bool)]
    if len(numbers) == len(keys) and numbers:
        low, high = min(numbers), max(numbers)
        # values that span a hundredfold are shown by their ratios
        if low > 0 and high / low >= 100:
            return {n: math.log(n / low) / math.log(high / low) for n in numbers}
        return {n: (n - low) / (high - low) if high > low else 0.5 for n in numbers}
    ordered = sorted(keys, key=str)
    return {key: i / (len(ordered) - 1) if len(ordered) > 1 else 0.5 for i, key in enumerate(ordered)}


def _ends_text(values: Sequence[object]) -> str:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and numbers:
        return f"{min(numbers):.4g} to {max(numbers):.4g}"
    return ", ".join(dict.fromkeys(str(v) for v in values))


def importance_figure(study: StoredStudy) -> list[Block]:
    """Return which share of the variation of each objective each value explains."""
    if not study.importance:
        return []
    names = [*dict.fromkeys(name for shares in study.importance.values() for name in shares)]
    most = {name: max(shares.get(name, 0.0) for shares in study.importance.values()) for name in names}
    names = sorted(names, key=lambda name: most[name])[-2 * _MOST_VALUES :]
    labels = _labels(names, 22)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(cut(objective)),
            "y": labels,
            "x": [shares.get(name, 0.0) for name in names],
            "marker": {"color": COLOURS[i % len(COLOURS)]},
            "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
        }
        for i, (objective, shares) in enumerate(study.importance.items())
    ]
    height = 120 + 22 * len(names) * len(data)
    drawn = layout(
        height,
        margin={"l": 160, "r": 12, "t": 30, "b": 70},
        barmode="group",
        showlegend=len(data) > 1,
        legend={"orientation": "h", "x": 0, "y": -0.3, "yanchor": "top"},
        xaxis={"tickformat": ".0%", "fixedrange": True, "rangemode": "tozero"},
        yaxis={"fixedrange": True, "type": "category", "tickfont": {"size": 10}},
    )
    lines = [f"  {name}: {most[name]:.0%} {'█' * round(most[name] * _BAR)}" for name in reversed(names)]
    title = "how much each value matters (PED-ANOVA: which share of the variation between trials it explains)"
    return [Figure(title, data, drawn, height, lines, "result.json: importance")]
