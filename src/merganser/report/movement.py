"""Tables and figures about how far models and merge moved, and how task vectors are related."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any

from ..record.reading import Moved, Record
from ..wording import count_text, digits_text, number_text, plural
from .blocks import Block, Cell, Code, Figure, Number, Paragraph, Section, Table, number
from .palette import COLOURS, SCALE, cut, escape, layout, percent_ticks, scale_end

__all__ = ["length_text", "moved_section", "related_section"]

_STRIP, _GAP, _EDGE = 18, 24, 88
"""Heights in pixels: a row of the heatmap, the title above a strip, the margins of the figure."""

_MOST_TENSORS = 8
"""Largest number of tensors that the hover text of a cell lists."""

_MOST_ROWS = 2000

_BARS = "▁▂▃▄▅▆▇█"

Names = Callable[[str], str]
"""Maps a model's name in the record to a short name."""


def moved_section(record: Record, name: Names, length: str) -> Section:
    """Return the section on how far models and merge moved from the base: in total, by layer and role, by tensor.

    Args:
        record: The run record.
        name: Short names of models.
        length: The text of `length_text`; empty if another section says it.
    """
    columns = _columns(record, name)
    origin = _origin(record, name)
    blocks: list[Block] = [Paragraph(_how(record, origin))]
    movement = record.movement
    if movement is not None and not movement.inputs:
        blocks.append(_places(movement.tensors, name))
    if movement is not None and movement.total.models:
        cells = [number(v, f"movement.total.models[{i}]") for i, v in enumerate(movement.total.models)]
        cells.append(number(movement.total.merged, "movement.total.merged"))
        rows: list[list[Cell]] = [[column, cell] for column, cell in zip(columns, cells, strict=True)]
        head = ["", "all tensors"]
        if movement.total.rounding:
            head.append("rounding")
            shares = [
                Number(None, "-") if v is None else Number(v, f"{v:.1%}", f"movement.total.rounding[{i}]")
                for i, v in enumerate(movement.total.rounding)
            ]
            rows = [[*row, cell] for row, cell in zip(rows, [*shares, Number(None, "-")], strict=True)]
        blocks.append(Table(head, rows, "merge.json: movement.total"))
        if movement.total.rounding:
            blocks.append(Paragraph("Rounding: what storing a model's weights makes up of its task vector."))
        if length:
            blocks.append(Paragraph(length))
    blocks += _heatmap(record, columns)
    outside = [moved for moved in record.layers if moved.layer is None]
    if outside:
        rows = [_row([moved.role], moved, len(columns)) for moved in outside]
        blocks.append(Table(["outside the layers", *columns], rows, "merge.json: layers[]"))
    inside = [moved for moved in record.layers if moved.layer is not None]
    if inside:
        rows = [_row([str(moved.layer), moved.role], moved, len(columns)) for moved in inside]
        head = ["layer", "role", *columns]
        blocks.append(Table(head, rows, "merge.json: layers[]", "by layer and role", folded=True))
    if movement is not None and movement.tensors:
        blocks.append(_by_tensor(movement.tensors, columns))
    return Section("How far each moved", blocks)


def related_section(record: Record, name: Names) -> Section:
    """Return the section on cosines and sign conflicts of task vectors."""
    title = "How task vectors are related"
    movement = record.movement
    if movement is None or movement.total.cosine is None:
        return Section(title, [Paragraph(_why_unrelated(record))])
    models = [name(model) for model in movement.inputs[1:]]
    blocks: list[Block] = [
        Paragraph(
            f"On the first {movement.pair_sample:,} elements of each tensor; a sample counts for its whole tensor. "
            "Exactly, over all elements:"
        ),
        Code(f"merganser inspect {shlex.join(movement.inputs[1:])} --base {shlex.quote(movement.inputs[0])}"),
        _matrix(models, movement.total.cosines, "cosines", "cosine of task vectors", ".3f", lambda v: v),
        _matrix(
            models,
            movement.total.sign_conflicts,
            "sign_conflicts",
            "sign conflict: of the elements that both changed, the share changed in opposite directions",
            ".1%",
            lambda v: (v - 0.5) * -2,
        ),
    ]
    blocks += _by_layer(record)
    return Section(title, blocks)


def length_text(record: Record) -> str:
    """Return the text that compares the length of the merged task vector with sums and averages; empty if unknown."""
    if record.movement is None or record.movement.total.length is None:
        return ""
    length, count = record.movement.total.length, len(record.movement.total.models)
    text = (
        f"The merged task vector is {digits_text(length)} times as long as the models' (root mean square of {count})."
    )
    if count > 1:
        text += f" Of unrelated ones the average is {digits_text(count**-0.5)} times as long, and the sum {digits_text(count**0.5)} times."
    return text


def _by_tensor(tensors: Sequence[Moved], columns: Sequence[str]) -> Table:
    """Return a table of tensors, limited to those that the merge moved most, so that browsers can show it."""
    shown, caption = tensors, "by tensor"
    if len(tensors) > _MOST_ROWS:
        shown = sorted(tensors, key=lambda t: -(t.merged or 0))[:_MOST_ROWS]
        caption = f"by tensor: the {_MOST_ROWS:,} of {len(tensors):,} that the merge moved most"
    rows = [_row([moved.name or ""], moved, len(columns)) for moved in shown]
    return Table(["tensor", *columns], rows, "merge.json: movement.tensors[]", caption, folded=True)


def _places(tensors: Sequence[Moved], name: Names) -> Table:
    """Return a table of the models that each range of layers comes from."""
    sources: dict[int | None, dict[str, None]] = defaultdict(dict)
    for tensor in tensors:
        sources[tensor.layer].update(dict.fromkeys(map(name, tensor.inputs)))
    rows: list[list[Cell]] = []
    layers = sorted(layer for layer in sources if layer is not None)
    for _, run in groupby(layers, key=lambda layer: list(sources[layer])):
        first, *others = run
        rows.append([f"{first} to {others[-1]}" if others else str(first), ", ".join(sources[first])])
    if None in sources:
        rows.append(["outside", ", ".join(sources[None])])
    return Table(["layers", "come from"], rows, "merge.json: movement.tensors[].inputs")


def _origin(record: Record, name: Names) -> str:
    movement = record.movement
    if movement is None or movement.from_base is None:
        return "the base or first model"
    if not movement.inputs:
        return "the base" if movement.from_base else "the first model"
    return f"{'the base' if movement.from_base else 'the first model'} ({name(movement.inputs[0])})"


def _how(record: Record, origin: str) -> str:
    text = f"Norm of the difference from {origin}, over its own norm"
    if record.movement is None:
        return f"{text}. This record is of an earlier version of merganser: it names no tensors and no task vectors."
    text += f", on the first {record.movement.sample:,} elements of each tensor; a sample counts for its whole tensor."
    if not record.movement.inputs:
        text += " Not all tensors come from the same models."
    return text


def _columns(record: Record, name: Names) -> list[str]:
    """Return the headings of the columns: the compared models, and the merge."""
    movement = record.movement
    if movement is not None and movement.inputs:
        return [*(name(model) for model in movement.inputs[1:]), "merge"]
    count = max((len(moved.models) for moved in record.layers), default=0)
    return [*(f"input {i + 2}" for i in range(count)), "merge"]


def _row(first: Sequence[str], moved: Moved, width: int) -> list[Cell]:
    values: list[Cell] = [number(v, f"{moved.place}.models[{i}]") for i, v in enumerate(moved.models)]
    values += [Number(None, "-")] * (width - 1 - len(values))
    return [*first, *values, number(moved.merged, f"{moved.place}.merged")]


def _why_unrelated(record: Record) -> str:
    if record.movement is None:
        return "The record is of an earlier version of merganser, which did not measure it."
    if record.movement.from_base is False:
        return "The merge has no base, so there are no task vectors."
    if not record.movement.inputs:
        return "The inputs differ between tensors, so there is nothing to compare over the whole model."
    if len(record.movement.inputs) < 3:
        return "There is one task vector alone."
    return "No two task vectors have a direction to compare."


def _heatmap(record: Record, columns: Sequence[str]) -> list[Block]:
    """Return a heatmap of roles by layers for each model and for the merge, all on one colour scale."""
    cells = {(moved.layer, moved.role): moved for moved in record.layers if moved.layer is not None}
    layers = sorted({layer for layer, _ in cells if layer is not None})
    roles = sorted({role for _, role in cells}, reverse=True)
    if not layers or not any(moved.merged is not None for moved in cells.values()):
        return []
    tensors = _tensors_of(record)
    top_value, beyond = scale_end(_values(cells.values()))
    heights = len(columns) * (len(roles) * _STRIP + _GAP)
    data, annotations, axes, lines = [], [], {}, []
    for i, column in enumerate(columns):
        top = 1 - (i * (len(roles) * _STRIP + _GAP) + _GAP) / heights
        bottom = top - len(roles) * _STRIP / heights
        axis = "" if i == 0 else str(i + 1)
        rows = [[_value(cells.get((layer, role)), i, len(columns)) for layer in layers] for role in roles]
        texts = [
            [_hover(cells.get((layer, role)), tensors[layer, role], i, len(columns)) for layer in layers]
            for role in roles
        ]
        trace = {
            "type": "heatmap",
            "x": layers,
            "y": [*map(escape, roles)],
            "z": rows,
            "text": texts,
            "hoverinfo": "text",
        }
        data.append({**trace, "xaxis": "x", "yaxis": f"y{axis}", "coloraxis": "coloraxis", "xgap": 1, "ygap": 1})
        axes[f"yaxis{axis}"] = {"domain": [max(bottom, 0), top], "fixedrange": True, "ticks": "", "showgrid": False}
        label = {"text": escape(cut(column)), "x": 0, "y": top, "xref": "paper", "yref": "paper", "showarrow": False}
        annotations.append({**label, "xanchor": "left", "yanchor": "bottom", "font": {"size": 12}})
        lines += _strip(column, list(reversed(roles)), list(reversed(rows)), top_value)
    axes |= _common_axes(f"y{axis}", top_value or 1)
    height = heights + _EDGE
    drawn = layout(height, annotations=annotations, **axes)
    title = "change by layer and role; point at a cell for its tensors"
    if beyond:
        title += f" (the scale ends at {number_text(top_value)}; {plural(beyond, 'value')} above it)"
    return [Figure(title, data, drawn, height, lines, "merge.json: layers[], movement.tensors[]")]


def _common_axes(lowest: str, largest: float) -> dict[str, Any]:
    """Return the axis of layers, at the lowest strip, and the colour scale, of all strips of a heatmap."""
    # the colour scale is above the strips, because at their side it would take a fifth of a phone's width
    scale = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": 1, "yanchor": "bottom", "thickness": 10, "len": 1}
    return {
        "xaxis": {
            "title": {"text": "layer"},
            "fixedrange": True,
            "anchor": lowest,
            "showgrid": False,
            "zeroline": False,
        },
        "coloraxis": {
            "colorscale": SCALE,
            "cmin": 0,
            "cmax": largest,
            "colorbar": {**scale, "outlinewidth": 0, "nticks": 6},
        },
    }


def _value(moved: Moved | None, column: int, columns: int) -> float | None:
    if moved is None:
        return None
    if column == columns - 1:
        return moved.merged
    return moved.models[column] if column < len(moved.models) else None


def _values(cells: Iterable[Moved]) -> list[float]:
    return [value for moved in cells for value in (*moved.models, moved.merged) if value is not None]


def _tensors_of(record: Record) -> Mapping[tuple[int | None, str], Sequence[Moved]]:
    cells: dict[tuple[int | None, str], list[Moved]] = defaultdict(list)
    for moved in record.movement.tensors if record.movement is not None else ():
        cells[moved.layer, moved.role].append(moved)
    return cells


def _hover(cell: Moved | None, tensors: Sequence[Moved], column: int, columns: int) -> str:
    """Return the hover text of a cell: its value, and those of its tensors, the largest first."""
    if cell is None:
        return ""
    lines = [f"<b>layer {cell.layer} · {escape(cell.role)}: {number_text(_value(cell, column, columns))}</b>"]
    lines.append(f"{plural(cell.tensors, 'tensor')}, {count_text(cell.parameters or 0)} parameters")
    ordered = sorted(tensors, key=lambda t: -(_value(t, column, columns) or 0))
    for tensor in ordered[:_MOST_TENSORS]:
        short = (tensor.name or "").partition(f".{tensor.layer}.")[2] or tensor.name or ""
        lines.append(f"{number_text(_value(tensor, column, columns))}  {escape(short)}")
        if tensor.inputs:
            # for the merge, the tensor that it started from
            which = tensor.inputs[0] if column == columns - 1 else tensor.inputs[column + 1]
            lines[-1] += f" of {escape(cut(which))}"
    if len(ordered) > _MOST_TENSORS:
        lines.append(f"and {len(ordered) - _MOST_TENSORS} more")
    return "<br>".join(lines)


def _strip(column: str, roles: Sequence[str], rows: Sequence[Sequence[float | None]], largest: float) -> list[str]:
    """Return a heatmap for a terminal: one character per layer."""
    width = max(map(len, roles))
    lines = [f"{column} (█ = {number_text(largest)})"]
    for role, row in zip(roles, rows, strict=True):
        letters = (" " if v is None else _BARS[min(int(8 * v / largest), 7)] if largest else _BARS[0] for v in row)
        lines.append(f"  {role.ljust(width)}  {''.join(letters)}")
    return lines


def _matrix(
    models: Sequence[str],
    values: Sequence[float | None],
    key: str,
    caption: str,
    form: str,
    shade: Callable[[float], float],
) -> Table:
    """Return a table of a value for each pair of models."""
    known = {
        pair: (k, value)
        for k, (pair, value) in enumerate(zip(combinations(range(len(models)), 2), values, strict=True))
    }
    rows: list[list[Cell]] = []
    for i, model in enumerate(models):
        row: list[Cell] = [f"{i + 1}  {model}"]
        for j in range(len(models)):
            if i == j:
                row.append(Number(None, "·"))
                continue
            k, value = known[min(i, j), max(i, j)]
            text = "-" if value is None else format(value, form)
            place = f"movement.total.{key}[{k}]"
            row.append(Number(value, text, place, None if value is None else shade(value)))
        rows.append(row)
    return Table(["", *(str(i + 1) for i in range(len(models)))], rows, f"merge.json: movement.total.{key}", caption)


def _by_layer(record: Record) -> list[Block]:
    """Return a figure of mean cosine and sign conflict over the layers, with a line for each role."""
    inside = [moved for moved in record.layers if moved.layer is not None and moved.cosine is not None]
    if len({moved.layer for moved in inside}) < 2:
        return []
    data, lines = [], []
    roles = sorted({moved.role for moved in inside})
    for i, role in enumerate(roles):
        members = [moved for moved in inside if moved.role == role]
        x = [moved.layer for moved in members]
        line = {"color": COLOURS[i % len(COLOURS)], "width": 2}
        shared: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "x": x,
            "line": line,
            "marker": {"size": 5},
            "name": role,
        }
        cosine, conflict = [m.cosine for m in members], [m.sign_conflict for m in members]
        data.append(
            {
                **shared,
                "y": cosine,
                "hovertemplate": f"layer %{{x}} · {escape(role)}<br>cosine %{{y:.3f}}<extra></extra>",
            }
        )
        hover = f"layer %{{x}} · {escape(role)}<br>sign conflict %{{y:.1%}}<extra></extra>"
        data.append({**shared, "y": conflict, "yaxis": "y2", "showlegend": False, "hovertemplate": hover})
        lines.append(f"  {role}: cosine {_range(cosine, '.3f')}, sign conflict {_range(conflict, '.1%')}")
    axis = {"fixedrange": True, "zeroline": False}
    ticks = percent_ticks([m.sign_conflict for m in inside if m.sign_conflict is not None])
    drawn = layout(
        440,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        xaxis={**axis, "title": {"text": "layer"}, "anchor": "y2"},
        yaxis={**axis, "domain": [0.54, 1], "title": {"text": "mean cosine"}},
        yaxis2={**axis, "domain": [0, 0.46], "title": {"text": "sign conflict"}, "tickformat": ticks},
    )
    title = "mean of all pairs, by layer and role"
    return [Figure(title, data, drawn, 440, lines, "merge.json: layers[].cosine, layers[].sign_conflict")]


def _range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):{form}} to {max(known):{form}}" if known else "-"
