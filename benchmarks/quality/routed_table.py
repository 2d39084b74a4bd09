"""The table of mixtures and routed models, from results/routed/."""

from collections.abc import Mapping, Sequence
from typing import Any

FOLDER = "routed"
"""Folder of the results, beside those of merged models."""


def tables(results: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]) -> list[str]:
    """Return the table of all sets for the page; nothing where there are no results.

    Args:
        results: Results by the name of their set.
        titles: Title of each set, by its name.
    """
    # what was measured again counts
    found = {name: {line["model"]: cell(line) for line in own} for name, own in results.items() if own}
    if not found:
        return []
    order = dict.fromkeys(model for own in found.values() for model in own)
    lines = [
        "Mixtures of experts with ridge routers (with the base's shared parts, or their average), and models that choose parts of "
        "their tasks by the text (*routed*, *gates*) or are told the task: mean / worst domain, in percent; then the share of "
        "windows of the test texts for which the choice is right (the expert or part that has most of a window), and what is stored beside the shared model, in percent of the experts' bytes."
        f"{_made_from(results)}",
        "",
        f"| | {' | '.join(titles[name] for name in found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    lines += [f"| {model} | {' | '.join(own.get(model, '') for own in found.values())} |" for model in order]
    return ["\n".join([*lines, ""])]


def _made_from(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return from how much text routers and gates were made."""
    found = sorted({(row["sequences"], row["length"]) for own in results.values() for row in own if "sequences" in row})
    texts = " or ".join(f"{sequences} sequences of {length} tokens" for sequences, length in found)
    return f" Routers and gates are made from {texts} of each train text." if found else ""


def cell(line: Mapping[str, Any]) -> str:
    """Return the figures of a result."""
    retention = line["retention"]
    if not retention or retention["mean"] is None or retention["mean"]["value"] is None:
        return "failed"
    text = f"{100 * retention['mean']['value']:.0f} / {100 * retention['worst']['value']:.0f}"
    right = [*line.get("right", {}).values()] or [share for share in [line.get("router_right")] if share is not None]
    # where the task is told there is no choice
    right = [] if line["model"].endswith("told") else right
    further = [f"{100 * sum(right) / len(right):.0f} right"] if right else []
    further += [f"{100 * line['stored_share']:.0f} stored"] if "stored_share" in line else []
    return "; ".join([text, *further])
