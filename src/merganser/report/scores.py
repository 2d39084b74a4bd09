"""Tables and figures about the scores of a merge in an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.stored import Estimate, EvaluatedModel, Evaluation, Retention
from ..record.reading import Record
from ..wording import number_text, time_text
from .blocks import Block, Cell, Figure, List, Number, Paragraph, Section, Table, estimate, share
from .palette import COLOURS, bounds, cut, escape, layout, percent_ticks

__all__ = ["own_model", "scores_section"]

_SYMBOLS = ("circle", "square", "triangle-up", "cross", "x", "star")
_UNITS = {
    "bits_per_byte": "Bits per byte: how many bits the model needs for a byte of text; 8 is knowing nothing.",
    "accuracy": "Accuracy: the share of questions that were answered right.",
    "accuracy_norm": "Accuracy norm: the share answered right, with answers compared per byte.",
}
"""What a metric means, in a sentence."""

_BAR = 40
"""Number of characters of the longest bar in a terminal."""


def scores_section(record: Record, found: Evaluation, own_hash: str) -> Section:
    """Return the section on scores, and on what models kept and lost.

    Args:
        record: The run record.
        found: The evaluation.
        own_hash: Hash of the merge, as an evaluation of it would contain it.
    """
    own, said = own_model(record, found, own_hash)
    said_of = [f"{task.name} has {task.items:,} {task.unit}s" for task in found.tasks]
    said_of += [f"{name} {value}" for name, value in found.settings.items() if value != "null"]
    blocks: list[Block] = [Paragraph(said)]
    blocks.append(_scores(found, own))
    blocks += [Paragraph(_UNITS[metric]) for metric in dict.fromkeys(t.metric for t in found.tasks) if metric in _UNITS]
    if found.differences:
        blocks.append(_differences(found, own))
    if found.retention:
        blocks.append(_retention(found, own))
        blocks.append(
            Paragraph(
                "Recovered: the share of an expert's gain over the base that a model keeps, on the expert's domain. "
                "Forgotten: what it lost on tasks that no expert is for, over the base's value."
            )
        )
        blocks += _kept_and_lost(found, own)
    else:
        blocks.append(Paragraph("What was kept and lost is shown if eval gets both --base and --experts."))
    blocks += _recovered(found)
    failed = [f"{model.name}: {model.failed}" for model in found.models if model.failed]
    failed += [f"{m} on {task}: {score.failed}" for (m, task), score in found.scores.items() if score.failed]
    for kind, texts in (("failed", failed), ("warnings", found.warnings)):
        if texts:
            blocks.append(List(kind, list(texts)))
    if found.not_counted:
        blocks.append(List("domains that do not count", [f"{n}: {why}" for n, why in found.not_counted.items()]))
    blocks.append(Paragraph(f"{found.file.name}, {found.created}, {time_text(found.seconds)}; {', '.join(said_of)}."))
    return Section("What it can do", blocks)


def own_model(record: Record, found: Evaluation, own_hash: str) -> tuple[EvaluatedModel | None, str]:
    """Return the merge's entry in an evaluation (None if there is none), and a sentence that says so or why not."""
    plus = "± is one standard error."
    for model in found.models:
        if model.hash == own_hash:
            return model, f"This merge is {model.name}. {plus}"
    for model in found.models:
        if model.kind == "checkpoint" and _same(model.reference, record.out):
            return None, (
                f"{found.file.name} is an evaluation of another checkpoint: {model.name} lay at {model.reference} as this "
                f"merge does, and was not the same (its hash was {model.hash}, that of the merge is {own_hash}). Evaluate {record.out} again. {plus}"
            )
    return None, f"{found.file.name} is an evaluation of other checkpoints: this merge is not among them. {plus}"


def _same(reference: str, out: Path) -> bool:
    try:
        return Path(reference).expanduser().resolve() == out.resolve()
    except (OSError, RuntimeError, ValueError):
        return False


def _shown(model: EvaluatedModel, own: EvaluatedModel | None) -> str:
    return f"{model.name} (this merge)" if model is own else model.name


def _scores(found: Evaluation, own: EvaluatedModel | None) -> Table:
    head = [
        "",
        "is",
        *(f"{t.name}: {t.metric.replace('_', ' ')} {'↑' if t.higher_is_better else '↓'}" for t in found.tasks),
    ]
    rows: list[list[Cell]] = []
    for model in found.models:
        row: list[Cell] = [model.name, "this merge" if model is own else model.role]
        for task in found.tasks:
            score = found.scores.get((model.name, task.name))
            row.append("failed" if score is None or score.failed else estimate(score.estimate))
        rows.append(row)
    return Table(head, rows, f"{found.file.name}: results", "scores (↑ higher is better, ↓ lower is better)")


def _differences(found: Evaluation, own: EvaluatedModel | None) -> Table:
    rows: list[list[Cell]] = []
    for model in found.models:
        if any((model.name, task.name) in found.differences for task in found.tasks):
            estimates = (estimate(found.differences.get((model.name, task.name))) for task in found.tasks)
            rows.append([_shown(model, own), *estimates])
    caption = f"difference from {found.reference}, paired item by item where that was possible"
    head = ["", *(f"{task.name} {'↑' if task.higher_is_better else '↓'}" for task in found.tasks)]
    return Table(head, rows, f"{found.file.name}: differences", caption)


def _retention(found: Evaluation, own: EvaluatedModel | None) -> Table:
    head = ["", "mean recovered", "worst recovered", "forgotten", "against the best single model"]
    rows: list[list[Cell]] = []
    for model in found.models:
        kept = found.retention.get(model.name)
        if kept is None:
            continue
        worst = estimate(kept.worst, percent=True)
        if isinstance(worst, Number) and kept.worst is not None and kept.worst.about:
            worst = Number(worst.value, f"{worst.text} ({kept.worst.about})", worst.place)
        others = (kept.mean_forgotten, kept.against_best_single)
        rows.append(
            [_shown(model, own), estimate(kept.mean, percent=True), worst, *(estimate(e, percent=True) for e in others)]
        )
    return Table(head, rows, f"{found.file.name}: retention.models", "kept and lost")


def _kept_and_lost(found: Evaluation, own: EvaluatedModel | None) -> list[Block]:
    """Return a figure of mean recovered against forgotten, with a marker for each model."""
    data: list[dict[str, Any]] = []
    lines: list[str] = []
    for i, model in enumerate(found.models):
        kept = found.retention.get(model.name)
        if kept is None or not (_has(kept.mean) and _has(kept.mean_forgotten)):
            continue
        mean, lost = kept.mean, kept.mean_forgotten
        assert mean is not None
        assert lost is not None
        text = f"{_shown(model, own)}: recovered {share(mean)}, forgotten {share(lost)}"
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(cut(_shown(model, own))),
                "x": [lost.value],
                "y": [mean.value],
                "error_x": _error([lost]),
                "error_y": _error([mean]),
                "marker": {
                    "color": COLOURS[i % len(COLOURS)],
                    "symbol": "diamond" if model is own else _SYMBOLS[i % len(_SYMBOLS)],
                    "size": 15 if model is own else 10,
                },
                "text": [escape(text)],
                "hoverinfo": "text",
            }
        )
        lines.append(f"  {text}")
    return [_scatter(data, lines, f"{found.file.name}: retention.models")] if data else []


def _scatter(data: list[dict[str, Any]], lines: list[str], source: str) -> Figure:
    """Return the figure of mean recovered against forgotten; each trace has one point."""
    height = 380 + 18 * len(data)
    across, up = [x for trace in data for x in trace["x"]], [y for trace in data for y in trace["y"]]
    # a model that is outside at one axis is not drawn, so its value at the other must not stretch that
    beside = [y for x, y in zip(across, up, strict=True) if not _outside(across, x)]
    drawn = layout(
        height,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        xaxis={**_axis(across), "title": {"text": "forgotten"}},
        yaxis={**_axis(beside, fixed=len(beside) < len(up)), "title": {"text": "mean recovered"}},
    )
    title = "what was recovered, against what was forgotten (better: up and left)"
    title += _beyond(
        trace["name"]
        for trace, x, y in zip(data, across, up, strict=True)
        if _outside(across, x) or _outside(beside, y)
    )
    return Figure(title, data, drawn, height, lines, source)


def _recovered(found: Evaluation) -> list[Block]:
    """Return a bar chart of what each model recovered in every domain."""
    domains = [task.name for task in found.tasks if any(_of(kept, task.name) for kept in found.retention.values())]
    if not domains:
        return []
    data: list[dict[str, Any]] = []
    lines: list[str] = []
    for i, model in enumerate(found.models):
        kept = found.retention.get(model.name)
        if kept is None:
            continue
        estimates = [_of(kept, domain) for domain in domains]
        data.append(
            {
                "type": "bar",
                "name": escape(cut(model.name)),
                "x": [escape(domain) for domain in domains],
                "y": [None if e is None else e.value for e in estimates],
                "error_y": _error(estimates),
                "marker": {"color": COLOURS[i % len(COLOURS)]},
                "hovertemplate": f"%{{x}} · {escape(model.name)}: %{{y:.1%}}<extra></extra>",
            }
        )
        lines.append(f"  {model.name}")
        width = max(map(len, domains))
        lines += [f"    {d.ljust(width)}  {_bar(e)}" for d, e in zip(domains, estimates, strict=True)]
    height = 380 + 18 * len(data)
    values = [y for trace in data for y in trace["y"] if y is not None]
    drawn = layout(
        height,
        barmode="group",
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.15, "yanchor": "top"},
        xaxis={"fixedrange": True, "type": "category"},
        yaxis={**_axis(values), "title": {"text": "recovered"}},
    )
    title = "recovered, by domain" + _beyond(t["name"] for t in data if any(_outside(values, y) for y in t["y"]))
    return [Figure(title, data, drawn, height, lines, f"{found.file.name}: retention.models[].recovered")]


def _of(kept: Retention, domain: str) -> Estimate | None:
    return kept.recovered.get(domain)


def _has(found: Estimate | None) -> bool:
    return found is not None and found.value is not None


def _axis(values: Sequence[float], *, fixed: bool = False) -> dict[str, Any]:
    """Return an axis of shares, on which one outlier does not push all others together.

    Args:
        values: The values.
        fixed: Whether the figure has other values, which plotly must not choose a range for.
    """
    axis: dict[str, Any] = {"tickformat": percent_ticks(values), "fixedrange": True}
    found = bounds(values)
    if found is None and fixed:
        edge = 0.1 * (max(values) - min(values)) or 0.01
        found = min(values) - edge, max(values) + edge
    return axis if found is None else {**axis, "range": list(found)}


def _outside(values: Sequence[float], value: float | None) -> bool:
    found = bounds(values)
    return found is not None and value is not None and not found[0] <= value <= found[1]


def _beyond(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"; outside the chart: {listed}" if listed else ""


def _error(estimates: Sequence[Estimate | None]) -> dict[str, object]:
    values = [0.0 if e is None or e.stderr is None else e.stderr for e in estimates]
    return {"type": "data", "array": values, "color": "#888888", "thickness": 1.5, "width": 4}


def _bar(found: Estimate | None) -> str:
    if found is None or found.value is None:
        return "not counted"
    letters = "█" * min(max(round(found.value * _BAR), 0), _BAR)
    return f"{letters.ljust(_BAR, '·')} {number_text(100 * found.value)} %"
