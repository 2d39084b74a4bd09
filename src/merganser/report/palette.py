"""Colours and fonts of figures, readable on light and dark backgrounds, in print, and for the colour-blind."""

from __future__ import annotations

from typing import Any

__all__ = ["COLOURS", "SCALE", "cut", "escape", "layout"]

COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#888888", "#DD7722")
"""Colours of lines and markers (Paul Tol's bright scheme, and one more)."""

SCALE = "Viridis"

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
