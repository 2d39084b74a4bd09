"""Colours, fonts and ranges of figures, readable on light and dark backgrounds, in print, and for the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["COLOURS", "SCALE", "bounds", "cut", "escape", "layout", "percent_ticks", "ramp", "scale_end"]

COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#888888", "#DD7722")
"""Colours of lines and markers (Paul Tol's bright scheme, and one more)."""

SCALE = "Viridis"

_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (216, 200, 20))
"""Viridis at five places; its end is darker here, to be seen on white."""

_LONGEST = 36


def layout(height: int, **more: Any) -> dict[str, Any]:
    """Return the plotly layout that all figures share; page.css sets the colours of text and lines."""
    return {
        "height": height,
        "margin": {"l": 70, "r": 12, "t": 30, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"bgcolor": "#222222", "font": {"color": "#ffffff", "size": 12}, "align": "left"},
        "dragmode": False,
        "showlegend": False,
        **more,
    }


def escape(text: str) -> str:
    """Escape text, so that plotly does not read it as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def cut(text: str) -> str:
    """Shorten a long name by omitting its middle, for labels of a figure."""
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}…{text[-half + 1 :]}"


def ramp(share: float) -> str:
    """Return the colour at a place of a scale, from 0 to 1, as `SCALE` has it."""
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    i = min(int(place), len(_STOPS) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(_STOPS[i], _STOPS[i + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def percent_ticks(values: Sequence[float]) -> str:
    """Return plotly's format of ticks that are shares, with as many digits as make neighbours differ."""
    spread = max(values, default=0) - min(values, default=0)
    return ".0%" if spread > 0.05 else ".1%" if spread > 0.005 else ".2%"


def scale_end(values: Sequence[float]) -> tuple[float, int]:
    """Return the end of a colour scale from 0, and how many values lie above it.

    It is the largest value, or the 98th percentile where the largest is more than three times that: one tensor that
    moved very far would leave all others in one colour.
    """
    if not values:
        return 0.0, 0
    ordered = sorted(values)
    most = ordered[int(0.98 * (len(ordered) - 1))]
    if most <= 0 or ordered[-1] <= 3 * most:
        return ordered[-1], 0
    return most, sum(value > most for value in ordered)


def bounds(values: Sequence[float]) -> tuple[float, float] | None:
    """Return a range for an axis that omits outliers; None if there are none, so that plotly may choose.

    A value at an end is an outlier if it is farther from its neighbour than twice the spread of all others; at least
    three values stay.
    """
    kept = sorted(values)
    while len(kept) > 3:
        below = kept[1] - kept[0] > 2 * (kept[-1] - kept[1]) > 0
        above = kept[-1] - kept[-2] > 2 * (kept[-2] - kept[0]) > 0
        if not below and not above:
            break
        kept = kept[1:] if below else kept[:-1]
    if len(kept) == len(values):
        return None
    edge = 0.1 * (kept[-1] - kept[0])
    return kept[0] - edge, kept[-1] + edge
