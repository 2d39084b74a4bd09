"""A table and a figure of the singular values of task vectors."""

from __future__ import annotations

from collections.abc import Callable

from ..inspection.spectra import SHARES, Spectra
from .blocks import Cell, Figure, Number, Paragraph, Section, Table
from .palette import COLOURS, cut, escape, layout

__all__ = ["spectra_section"]

_HEIGHT = 470


def spectra_section(spectra: Spectra, name: Callable[[str], str]) -> Section:
    """Return the section on how the singular values of task vectors decrease, for each matrix."""
    columns = [*(name(model) for model in spectra.models), "merge"]
    share = SHARES[1]
    rows: list[list[Cell]] = []
    for matrix in spectra.matrices:
        cells: list[Cell] = [matrix.name, f"{min(matrix.shape):,}"]
        for decay in matrix.decays:
            count = decay.needed[SHARES.index(share)] if decay.needed else None
            cells.append(Number(count, "-" if count is None else f"{count:,}"))
        rows.append(cells)
    caption = f"singular values that hold {share:.0%} of the squared norm of the task vector"
    how = (
        f"Measured now, on the weights: every matrix of {len({m.layer for m in spectra.matrices})} layers. A fine-tune "
        "that moved in few directions needs few singular values."
    )
    table = Table(["matrix", "of", *columns], rows, "measured on the weights by --spectra", caption)
    return Section("Singular values of task vectors", [Paragraph(how), _figure(spectra, columns), table])


def _figure(spectra: Spectra, columns: list[str]) -> Figure:
    data, buttons, lines = [], [], []
    width = len(columns)
    for k, matrix in enumerate(spectra.matrices):
        for i, (column, decay) in enumerate(zip(columns, matrix.decays, strict=True)):
            merged = i == width - 1
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": escape(cut(column)),
                    "x": decay.ranks,
                    "y": decay.values,
                    "line": {
                        "color": "#999999" if merged else COLOURS[i % len(COLOURS)],
                        "width": 3 if merged else 2,
                        "dash": "dot" if merged else "solid",
                    },
                    "visible": k == 0,
                    "hovertemplate": f"{escape(column)}<br>%{{x}}: %{{y:.3g}}<extra></extra>",
                }
            )
        shown = [j // width == k for j in range(width * len(spectra.matrices))]
        buttons.append({"label": escape(cut(matrix.name)), "method": "restyle", "args": [{"visible": shown}]})
        needed = ", ".join(
            f"{column} {d.needed[1] if d.needed else '-'}" for column, d in zip(columns, matrix.decays, strict=True)
        )
        lines.append(f"  {matrix.name} (of {min(matrix.shape)}): {needed}")
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.16, "yanchor": "top", "showactive": True}
    drawn = layout(
        _HEIGHT,
        margin={"l": 70, "r": 12, "t": 70, "b": 44},
        updatemenus=[menu],
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top"},
        xaxis={"title": {"text": "singular value, from the largest"}, "fixedrange": True, "type": "log"},
        yaxis={"title": {"text": "over the largest"}, "fixedrange": True, "rangemode": "tozero"},
    )
    title = "how singular values fall; choose a matrix"
    return Figure(title, data, drawn, _HEIGHT, lines, "measured on the weights by --spectra")
