"""Plots of docs/quality.md: recovered against forgotten, the worst domain, and the number of experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.merge.svg import Drawing

Entries = Sequence[Mapping[str, Any]]

_LOW, _HIGH = -0.5, 1.0
_COLOURS = ("a", "b", "c", "soft")


def recovered_and_forgotten(title: str, entries: Entries) -> Drawing:
    """Draw recovered against forgotten; what collapsed lies at the edge."""
    shown = [entry for entry in entries if entry["mean"] is not None]
    drawing = Drawing(760, 460, title, "recovered (up is better) against forgotten; at the edge: or beyond")
    left, right, top, bottom = 60, 730, 70, 410
    widest = max(0.05, min(0.1, max((entry["forgotten"] for entry in shown), default=0.05)))

    def x(value: float) -> float:
        return left + (right - left) * (min(max(value, -0.02), widest) + 0.02) / (widest + 0.02)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (min(max(value, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)

    for tick in (-0.5, 0.0, 0.5, 1.0):
        drawing.line([(left, y(tick)), (right, y(tick))], "rule")
        drawing.text(left - 8, y(tick) + 4, f"{100 * tick:.0f} %", kind="soft", anchor="end")
    for step in range(5):
        value = widest * step / 4
        drawing.text(x(value), bottom + 18, f"{100 * value:.1f} %", kind="soft", anchor="middle")
    placed: list[tuple[float, float]] = []
    for entry in shown:
        at = (x(entry["forgotten"]), y(entry["mean"]))
        drawing.dot(*at, "a" if entry["label"] == "default" else "b", radius=4)
        # a name where there is room for it
        if all(abs(at[0] - other[0]) > 90 or abs(at[1] - other[1]) > 11 for other in placed):
            end = at[0] > right - 110
            drawing.text(
                at[0] + (-7 if end else 7), at[1] + 4, entry["method"], kind="soft", anchor="end" if end else "start"
            )
            placed.append(at)
    drawing.legend(left, 448, [("dot", "a", "published settings"), ("dot", "b", "tuned")])
    return drawing


def worst_domains(title: str, entries: Entries) -> Drawing:
    """Draw a line per method, from its worst domain to the mean of all."""
    shown = [entry for entry in entries if entry["mean"] is not None and entry["label"] == "default"]
    left, right, top, row = 160, 730, 70, 16
    bottom = top + row * len(shown)
    drawing = Drawing(760, bottom + 60, title, "share of the gain that is kept, published settings")

    def x(value: float) -> float:
        return left + (right - left) * (min(max(value, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)

    for tick in (-0.5, 0.0, 0.5, 1.0):
        drawing.line([(x(tick), top - 6), (x(tick), bottom)], "rule")
        drawing.text(x(tick), bottom + 16, f"{100 * tick:.0f} %", kind="soft", anchor="middle")
    for number, entry in enumerate(shown):
        y = top + row * (number + 0.5)
        worst, mean = x(entry["worst"]["value"]), x(entry["mean"])
        drawing.line([(worst, y), (mean, y)], "floor", width=2)
        drawing.dot(worst, y, "b", radius=4)
        drawing.dot(mean, y, "a", radius=4)
        drawing.text(left - 10, y + 4, entry["method"], kind="soft", anchor="end")
    drawing.legend(left, bottom + 44, [("dot", "a", "mean of the domains"), ("dot", "b", "worst domain")])
    return drawing


def by_number(sets: Sequence[Entries], chosen: Sequence[str]) -> Drawing:
    """Draw the mean against the number of experts, a line per method; some of them stand out.

    Args:
        sets: Entries of at least two sets of different size.
        chosen: Methods to name, at most four.
    """
    drawing = Drawing(760, 420, "More experts", "mean share of the gain that is kept, published settings")
    left, right, top, bottom = 60, 560, 70, 370
    means = [{e["method"]: e["mean"] for e in entries if e["label"] == "default"} for entries in sets]

    def y(value: float) -> float:
        return bottom - (bottom - top) * (min(max(value, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)

    places = [left + (right - left) * i / (len(sets) - 1) for i in range(len(sets))]
    for tick in (-0.5, 0.0, 0.5, 1.0):
        drawing.line([(left, y(tick)), (right, y(tick))], "rule")
        drawing.text(left - 8, y(tick) + 4, f"{100 * tick:.0f} %", kind="soft", anchor="end")
    for place, entries in zip(places, sets, strict=True):
        drawing.text(place, bottom + 18, f"{count_of(entries)} experts", kind="soft", anchor="middle")
    known = [name for name in means[0] if all(own.get(name) is not None for own in means)]
    for name in sorted(known, key=lambda name: name in chosen):
        line = [(place, y(own[name])) for place, own in zip(places, means, strict=True)]
        stands_out = name in chosen
        colour = _COLOURS[chosen.index(name) % len(_COLOURS)] if stands_out else "rule"
        drawing.line(line, colour, width=2.5 if stands_out else 1)
    heights: list[float] = []
    for name in sorted((name for name in chosen if name in known), key=lambda name: -means[-1][name]):
        height = max([y(means[-1][name]) + 4, *(other + 13 for other in heights)])
        heights.append(height)
        drawing.text(right + 8, height, name, kind="soft")
    return drawing


def count_of(entries: Entries) -> int:
    """Return the number of experts of a set."""
    return len(next(entry["result"]["retention"]["recovered"] for entry in entries if entry["mean"] is not None))
