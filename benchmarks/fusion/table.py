"""Tables of docs/fuse.md, from results.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_START, _END = "<!-- fusion:start -->", "<!-- fusion:end -->"
_NAMES = {
    "average": "average of the experts",
    "control": "base, plain fine-tuning (control)",
    "mince": "base, FuseLLM's MinCE",
    "avgce": "base, FuseLLM's AvgCE",
    "alone": "base, the experts alone, MinCE",
    "distilled_control": "average, plain fine-tuning (control)",
    "distilled": "average, its experts alone, MinCE",
}
_SURE = 2.0
"""Standard errors from which a difference is called one."""


def write(page: Path, results: Mapping[str, Any] | None) -> None:
    """Write the tables between the markers of a page; None where nothing was measured.

    Raises:
        ValueError: The page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    if _START not in text or _END not in text:
        raise ValueError(f"{page}: has no {_START} and {_END}, between which the tables go")
    head, _, rest = text.partition(_START)
    tail = rest.partition(_END)[2]
    own = "Not measured yet: `scripts/bench fusion` does.\n" if results is None else tables(results)
    page.write_text(f"{head}{_START}\n{own}{_END}{tail}", encoding="utf-8")


def tables(results: Mapping[str, Any]) -> str:
    """Return both tables: bits per byte of every model, and differences from the controls."""
    config = results["config"]
    domains, tasks = config["experts"], list(results["windows"])
    heads = [_task(task) for task in tasks]
    trained = [name for name in config["runs"] if name in results["trainings"]]
    lines = [
        "Bits per byte of held-out text:",
        "",
        f"| model | λ | {' | '.join(heads)} | CPU s |",
        f"|---|---|{'---|' * len(tasks)}---|",
    ]
    for name in ("base", *domains, "average", *_ordered(config, trained)):
        bits = results["bits_per_byte"][name]
        cells = [f"{bits[task]['value']:.4f}" for task in tasks]
        run = config["runs"].get(name)
        share = "" if run is None else f"{run['lambda']:g}"
        lines.append(f"| {_name(name, domains)} | {share} | {' | '.join(cells)} | {_seconds(results, name)} |")
    lines += [
        "",
        "Less the control, ± standard error of the paired windows; bold where a difference is above two of them (below zero is better):",
        "",
        f"| model | control | {' | '.join(heads)} | mean of the three |",
        f"|---|---|{'---|' * len(tasks)}---|",
    ]
    for name in _ordered(config, trained):
        own = results["beside"].get(name)
        if own is not None:
            cells = [_difference(own[task]) for task in (*tasks, "mean")]
            lines.append(f"| {_NAMES[name]} | {_NAMES[own['control']]} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _ordered(config: Mapping[str, Any], trained: Sequence[str]) -> list[str]:
    """Return the trainings, each behind its control."""
    runs = config["runs"]
    return sorted(trained, key=lambda name: (runs[name]["student"] != "base", "beside" in runs[name]))


def _name(name: str, domains: Sequence[str]) -> str:
    return f"expert: {_task(name)}" if name in domains else _NAMES.get(name, name)


def _task(name: str) -> str:
    return {"middle_english": "Middle English", "english": "English (none's domain)"}.get(name, name)


def _seconds(results: Mapping[str, Any], name: str) -> str:
    """Return the processor seconds of a training; of one that was killed and continued those of its last part are unknown."""
    own, training = results["commands"].get(name), results["trainings"].get(name)
    if own is None or training is None:
        return ""
    return "continued" if training["continued"] else f"{own['cpu_seconds']:.0f}"


def _difference(own: Mapping[str, float]) -> str:
    shown = f"{own['value']:+.4f} ± {own['stderr']:.4f}"
    return f"**{shown}**" if abs(own["value"]) > _SURE * own["stderr"] else shown
