"""Draws docs/images/ from the results, and prints the tables of docs/speed.md."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .svg import Drawing, linear_ticks, log_scale, log_ticks
from .tables import END, START, tables

_COLOURS = ("a", "c", "b")

Entry = Mapping[str, Any]


def draw(results: Path, images: Path, page: Path | None = None) -> None:
    """Draw what there are results for.

    Args:
        results: Folder of result files.
        images: Where the drawings go.
        page: A Markdown file to put the tables into, between its markers; they are printed in any case.

    Raises:
        ValueError: The page has no markers.
    """
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))}
    for name in ("methods", "peer"):
        if name in found:
            draw_speed(found[name], first=name == "peer").save(images / f"merge-speed-{name}.svg")
            draw_memory(found[name]).save(images / f"merge-memory-{name}.svg")
    if "scaling" in found:
        draw_scaling(found["scaling"], "time").save(images / "scaling-time.svg")
        draw_scaling(found["scaling"], "memory").save(images / "scaling-memory.svg")
    text = tables(found)
    sys.stdout.write(text)
    if page is not None:
        page.write_text(_between_markers(page.read_text(encoding="utf-8"), text, page), encoding="utf-8")


def draw_speed(result: Entry, *, first: bool = False) -> Drawing:
    """Draw the time of each method, the floor, and mergekit's time.

    Args:
        result: The contents of a result file.
        first: Whole commands, the first run of ours, rather than the median of later runs above start-up.
    """
    entries = _measured(result)

    def ours_of(entry: Entry) -> float:
        return float(entry["first"]["seconds"]) if first else _time(entry)

    def theirs_of(entry: Entry) -> float:
        return float(entry["peer"]["seconds"]["median"]) if first else _time(entry["peer"])

    times = [
        value
        for entry in entries
        for value in (entry["floor"]["median"], ours_of(entry), *([theirs_of(entry)] if "peer" in entry else []))
    ]
    left, right, top = 140, 560, 92
    bottom = top + 26 * len(entries)
    title = "Seconds to merge, whole command, first run" if first else "Seconds to merge, above start-up"
    drawing = Drawing(760, bottom + 44, title, _setting(result))
    with_peer = any("peer" in entry for entry in entries)
    drawing.legend(
        left,
        70,
        [
            ("tick", "floor", "floor: plain reading and writing"),
            ("dot", "a", "Merganser"),
            *([("dot", "b", _peer_name(result))] if with_peer else []),
        ],
    )
    ticks = log_ticks(min(times), max(times))
    place = log_scale(ticks[0], ticks[-1], left, right)
    for tick in ticks:
        drawing.line([(place(tick), top - 8), (place(tick), bottom)], "rule")
        drawing.text(place(tick), bottom + 18, f"{tick:g} s", kind="soft", anchor="middle")
    for row, entry in enumerate(entries):
        y = top + 26 * row + 9
        drawing.text(left - 14, y + 4, entry["method"], anchor="end")
        ours = place(ours_of(entry))
        note = f"{ours_of(entry):.1f} s"
        if "peer" in entry:
            theirs = place(theirs_of(entry))
            drawing.line([(ours, y), (theirs, y)], "rule", width=3)
            drawing.dot(theirs, y, "b")
            note += f", {_seconds(theirs_of(entry))} with mergekit"
        floor = place(entry["floor"]["median"])
        drawing.line([(floor, y - 7), (floor, y + 7)], "floor", width=3)
        drawing.dot(ours, y, "a")
        drawing.text(right + 16, y + 4, note, kind="soft")
    return drawing


def draw_memory(result: Entry) -> Drawing:
    """Draw the largest resident memory of each method, and mergekit's."""
    entries = _measured(result)
    left, right, top, row_height = 140, 680, 92, 30
    bottom = top + row_height * len(entries)
    drawing = Drawing(760, bottom + 44, "Largest resident memory", _setting(result))
    with_peer = any("peer" in entry for entry in entries)
    drawing.legend(left, 70, [("bar", "a", "Merganser"), *([("bar", "b", _peer_name(result))] if with_peer else [])])
    peaks = [peak for entry in entries for peak in (_gigabytes(entry), _gigabytes(entry.get("peer")))]
    ticks = linear_ticks(max(peaks))
    for tick in ticks:
        x = left + (right - left) * tick / ticks[-1]
        drawing.line([(x, top - 8), (x, bottom)], "rule")
        drawing.text(x, bottom + 18, f"{tick:g} GB", kind="soft", anchor="middle")
    for row, entry in enumerate(entries):
        y = top + row_height * row
        drawing.text(left - 14, y + 14, entry["method"], anchor="end")
        for line, (colour, part) in enumerate((("a", entry), ("b", entry.get("peer")))):
            if part is not None:
                width = (right - left) * _gigabytes(part) / ticks[-1]
                drawing.bar(left, y + 11 * line, width, 9, colour)
                drawing.text(left + width + 6, y + 11 * line + 8, f"{_gigabytes(part):.2f}", kind="soft")
    return drawing


def draw_scaling(result: Entry, what: str) -> Drawing:
    """Draw time or memory against the size of the models, their number, and the number of threads."""
    entries = [entry for entry in result["results"] if "error" not in entry]
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    by_time = what == "time"
    title = "Seconds to merge, above start-up" if by_time else "Largest resident memory"
    drawing = Drawing(760, 360, f"{title}, as merges grow", _machine(result))
    floor_text = "floor: plain reading and writing" if by_time else "size of the inputs"
    legend = [("dot", _COLOURS[i % 3], method) for i, method in enumerate(methods)]
    drawing.legend(60, 68, [*legend, ("dash", "floor", floor_text)])

    def value(entry: Entry) -> float:
        return _time(entry) if by_time else _gigabytes(entry)

    def floor(entry: Entry) -> float:
        return float(entry["floor"]["median"]) if by_time else entry["read_bytes"] / 1e9

    every = [number for entry in entries for number in (value(entry), floor(entry))]
    ticks = log_ticks(min(every), max(every))
    up = log_scale(ticks[0], ticks[-1], 300, 96)
    unit = "s" if by_time else "GB"
    for tick in ticks:
        drawing.text(52, up(tick) + 4, f"{tick:g} {unit}", kind="soft", anchor="end")
    for column, (axis, label) in enumerate(_AXES):
        points = [entry for entry in entries if entry["axis"] == axis]
        if points:
            left = 66 + 232 * column
            for tick in ticks:
                drawing.line([(left, up(tick)), (left + 206, up(tick))], "rule")
            steps = sorted({entry["value"] for entry in points})
            across = log_scale(steps[0], max(steps[-1], steps[0] * 1.01), left + 16, left + 190)
            for step in steps:
                drawing.text(across(step), 318, f"{step:g}", kind="soft", anchor="middle")
            drawing.text(left + 103, 338, label.format(**_fixed(points)), kind="soft", anchor="middle")
            for i, method in enumerate(methods):
                own = sorted((e for e in points if e["method"] == method), key=lambda entry: entry["value"])
                drawing.line([(across(e["value"]), up(floor(e))) for e in own], "floor", width=1.5, dash="4 3")
                drawing.line([(across(e["value"]), up(value(e))) for e in own], _COLOURS[i % 3], width=2)
                for entry in own:
                    drawing.dot(across(entry["value"]), up(value(entry)), _COLOURS[i % 3], radius=4)
    return drawing


_AXES = (
    ("size", "billion parameters ({models} models)"),
    ("models", "models of {billions:.2f} B"),
    ("threads", "threads ({models} models of {billions:.2f} B)"),
)


def _fixed(points: Sequence[Entry]) -> dict[str, Any]:
    return {"models": points[0]["models"], "billions": points[0]["parameters"] / 1e9}


def _measured(result: Entry) -> list[Entry]:
    return [entry for entry in result["results"] if "error" not in entry]


def _time(entry: Entry) -> float:
    # on a busy machine start-up may have taken longer than the merge
    return max(float(entry["above_startup"]["median"]), 0.01)


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _gigabytes(entry: Entry | None) -> float:
    return 0.0 if entry is None else entry["peak_mb"] / 1000


def _peer_name(result: Entry) -> str:
    return f"mergekit {result['hardware'].get('peer_versions', {}).get('mergekit', '')}".strip()


def _machine(result: Entry) -> str:
    hardware = result["hardware"]
    return f"{hardware['processors']} processors, {hardware['memory_gb']:.0f} GB, {hardware['filesystem']}; log scales"


def _setting(result: Entry) -> str:
    config = result["config"]
    size = config["shape"]["parameters"] / 1e9
    return (
        f"up to {config['models']} models and a base of {size:.2f} B parameters each, bfloat16, from the page cache, on "
        f"{result['hardware']['processors']} processors"
    )


def _between_markers(page: str, text: str, file: Path) -> str:
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{file}: has no lines {START} and {END} for the tables to go between")
    return before + text.strip() + after
