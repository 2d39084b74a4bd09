"""Tables and plots of docs/quality.md, from results/."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.merge.svg import Drawing

Result = Mapping[str, Any]

_START, _END = "<!-- quality:start -->", "<!-- quality:end -->"
_NAMES = {"default": "published", "tuned": "tuned"}


def mean_recovered(result: Result) -> tuple[float, float] | None:
    """Return the mean share of the experts' gain that a merge keeps, and its standard error."""
    mean = result["retention"]["mean"]
    return None if mean is None or mean["value"] is None else (mean["value"], mean["stderr"])


def write(results: Path, docs: Path) -> None:
    """Write the plots, and the tables between the markers of quality.md.

    Raises:
        FileNotFoundError: There are no results.
    """
    folders = sorted((path for path in results.glob("*") if path.is_dir()), key=lambda path: len(_experts(path)))
    if not folders:
        raise FileNotFoundError(f"{results}: no results; measure first: python -m benchmarks.quality run")
    parts = []
    for folder in folders:
        entries = _entries(folder)
        _draw(folder.name, entries).save(docs / "images" / f"quality-{folder.name}.svg")
        parts.append(_section(folder.name, entries))
    page = docs / "quality.md"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(_START)
    tail = rest.partition(_END)[2]
    page.write_text("\n".join([f"{head}{_START}", *parts, f"{_END}{tail}"]), encoding="utf-8")


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Return one entry per method and setting that was measured on the test texts, the best first."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result.get("split") == "test" and "retention" in result and "method" in result:
            groups.setdefault((result["method"], result["label"]), []).append(result)
    entries = [_entry(method, label, seeds) for (method, label), seeds in groups.items()]
    return sorted(entries, key=lambda entry: -entry["mean"] if entry["mean"] is not None else float("inf"))


def _entry(method: str, label: str, seeds: Sequence[Result]) -> dict[str, Any]:
    """Average over seeds."""
    means = [found for result in seeds if (found := mean_recovered(result)) is not None]
    first = seeds[0]
    entry: dict[str, Any] = {"method": method, "label": label, "seeds": len(seeds), "result": first, "mean": None}
    if len(means) < len(seeds):
        return {**entry, "failed": first["failed"] or "no figure"}
    retentions = [result["retention"] for result in seeds]
    spread = max(value for value, _ in means) - min(value for value, _ in means) if len(seeds) > 1 else None
    return {
        **entry,
        "mean": sum(value for value, _ in means) / len(means),
        "stderr": sum(error for _, error in means) / len(means),
        "spread": spread,
        "worst": min((r["worst"] for r in retentions), key=lambda worst: worst["value"]),
        "forgotten": sum(r["mean_forgotten"]["value"] for r in retentions) / len(retentions),
        "forgotten_stderr": retentions[0]["mean_forgotten"]["stderr"],
        "seconds": sum(result["seconds"]["load"] for result in seeds) / len(seeds),
    }


def _section(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    experts = _experts_of(entries)
    lines = [
        f"## {len(experts)} experts: {', '.join(experts)}",
        "",
        f"![recovered against forgotten](images/quality-{name}.svg)",
        "",
        "| method | settings | recovered, mean | worst domain | forgotten | merge, s |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        shown = f"{_NAMES[entry['label']]}{_setting(entry['result'])}"
        if entry["mean"] is None:
            lines.append(f"| {entry['method']} | {shown} | failed: {entry['failed']} | | | |")
            continue
        seeds = f" ({entry['seeds']} seeds, spread {100 * entry['spread']:.1f})" if entry["spread"] is not None else ""
        worst = entry["worst"]
        lines.append(
            f"| {entry['method']} | {shown} | {_percent(entry['mean'], entry['stderr'])}{seeds} | "
            f"{_percent(worst['value'], worst['stderr'])} {worst['domain']} | "
            f"{_percent(entry['forgotten'], entry['forgotten_stderr'])} | {entry['seconds']:.0f} |"
        )
    hardware = entries[0]["result"]["hardware"]
    lines += [
        "",
        f"Measured on {hardware['processor']}, {hardware['processors']} cores, {hardware['date']}; {len(entries)} rows.",
        "",
    ]
    return "\n".join(lines)


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def _setting(result: Result) -> str:
    setting = {**result["setting"]["each"], **result["setting"]["shared"]}
    return ": " + ", ".join(f"{key} {value:g}" for key, value in setting.items()) if setting else ""


def _experts_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(entries[0]["result"]["retention"]["recovered"])


def _experts(folder: Path) -> list[str]:
    entries = _entries(folder)
    return _experts_of(entries) if entries else []


def _draw(name: str, entries: Sequence[Mapping[str, Any]]) -> Drawing:
    """Draw recovered against forgotten; what collapsed lies at the edge."""
    shown = [entry for entry in entries if entry["mean"] is not None]
    drawing = Drawing(760, 460, f"{len(_experts_of(entries))} experts", "recovered (up is better) against forgotten")
    left, right, top, bottom = 60, 730, 70, 410
    low, high = -0.5, 1.0
    widest = max(0.05, min(0.5, max((entry["forgotten"] for entry in shown), default=0.05)))

    def x(value: float) -> float:
        return left + (right - left) * (min(max(value, -0.02), widest) + 0.02) / (widest + 0.02)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (min(max(value, low), high) - low) / (high - low)

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
