"""What `merganser auto`, and a plain search, make of a set of experts within some minutes, measured on the test texts.

Both choose on the tune texts and calibrate on the train texts, as a user would; neither sees the test texts. A result is a
line of results/auto.jsonl.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.merge import hardware
from benchmarks.zoo import Zoo
from merganser.search import search
from merganser.search.auto import auto
from merganser.version import __version__
from merganser.wording import default_names

FILE = "auto.jsonl"
HIGHEST = 1.5
"""Upper end of the weights that the plain search tries."""

Evaluate = Callable[[str, Mapping[str, Path], str], dict[str, Any]]


def measure(
    name: str,
    zoo: Zoo,
    experts: Mapping[str, Path],
    evaluate: Evaluate,
    results: Path,
    work: Path,
    *,
    minutes: float,
    limit: int | None,
    context: int,
    windows: int,
    kinds: Sequence[str] = ("auto",),
) -> list[dict[str, Any]]:
    """Run `auto`, or a search over the weights of task arithmetic, and add what it keeps to the results.

    A run that was stopped is continued; its folder is removed when its result is written.

    Args:
        name: Name of the set.
        zoo: The zoo.
        experts: The experts by domain.
        evaluate: Measures a model on texts: those of `test`.
        results: Folder of the results.
        work: Folder for what is kept meanwhile.
        minutes: The time of each.
        limit: Windows of each tune text; None for all.
        context: Tokens of a window.
        windows: Windows of each test text that `evaluate` takes.
        kinds: "auto", "search".
    """
    found = []
    for kind in kinds:
        folder = work / f"{kind}-{name}-{minutes:g}"
        begin = time.monotonic()
        made = (_auto if kind == "auto" else _search)(zoo, experts, folder, minutes, limit, context)
        seconds = time.monotonic() - begin
        measured = evaluate(made.pop("model"), experts, "test")
        line = {
            "set": name,
            "kind": kind,
            "minutes": minutes,
            "limit": limit,
            "context": context,
            "windows": windows,
            "seconds": round(seconds, 1),
            **made,
        }
        line |= {"retention": measured["retention"], "failed": measured["failed"], "version": __version__}
        line["hardware"] = hardware.describe(work)
        with (results / FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
        shutil.rmtree(folder)
        found.append(line)
    return found


def _auto(
    zoo: Zoo, experts: Mapping[str, Path], folder: Path, minutes: float, limit: int | None, context: int
) -> dict[str, Any]:
    found = auto(
        str(zoo.base),
        [str(path) for path in experts.values()],
        folder,
        _tasks(zoo, experts),
        data={name: zoo.texts[domain]["train"] for name, domain in zip(_names(zoo, experts)[1:], experts, strict=True)},
        minutes=minutes,
        limit=limit,
        context=context,
    )
    winner = yaml.safe_load(found.folder.joinpath("winner.yaml").read_text(encoding="utf-8"))
    return {
        "model": _recommended(found.recommended, found.merged, found.folder, zoo, experts),
        "recommended": found.recommended,
        "winner": found.winner,
        "method": winner["merge_method"],
        "tried": len(found.tried),
        "around": len(found.around),
        "items": sum(tried.items for tried in found.tried) + sum(t.items for t in found.around),
        "held_out": found.ends[0].values[0] if found.ends[0].values else None,
    }


def _search(
    zoo: Zoo, experts: Mapping[str, Path], folder: Path, minutes: float, limit: int | None, context: int
) -> dict[str, Any]:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(zoo.base),
        "models": [{"model": str(path)} for path in experts.values()],
        "parameters": {"weight": {"search": [0, HIGHEST], "per": "model"}},
    }
    found = search(
        recipe,
        folder,
        _tasks(zoo, experts),
        base=str(zoo.base),
        experts={domain: str(path) for domain, path in experts.items()},
        hours=minutes / 60,
        limit=limit,
        context=context,
    )
    assert found.best is not None
    return {
        "model": str(folder / "winner.yaml"),
        "recommended": "winner",
        "winner": found.best.name,
        "method": "task_arithmetic",
        "tried": len(found.trials),
        "around": 0,
        "items": sum(trial.items for trial in found.trials if trial.same_as is None),
        "held_out": [found.ends[0].values[0].value, found.ends[0].values[0].stderr] if found.ends[0].values else None,
    }


def _tasks(zoo: Zoo, experts: Mapping[str, Path]) -> dict[str, Path]:
    return {domain: zoo.texts[domain]["tune"] for domain in [*experts, zoo.retained]}


def _names(zoo: Zoo, experts: Mapping[str, Path]) -> list[str]:
    """Return what `auto` calls the base and the experts."""
    return default_names([str(path) for path in (zoo.base, *experts.values())])


def _recommended(name: str, merged: Path | None, folder: Path, zoo: Zoo, experts: Mapping[str, Path]) -> str:
    if merged is not None:
        return str(merged)
    if name == "average":
        return str(folder / "recipes" / "average.yaml")
    return str(dict(zip(_names(zoo, experts), (zoo.base, *experts.values()), strict=True))[name])


def section(
    results: Sequence[Mapping[str, Any]],
    published: Mapping[str, Sequence[Mapping[str, Any]]],
    names: Mapping[str, str],
    windows: int,
) -> str:
    """Return the section of the quality page.

    Args:
        results: Lines of the results; of two of one set, kind and time the later one counts.
        published: Entries of the table by set, the best first.
        names: What sets are called.
        windows: Windows of each test text that the other rows are measured on; lines of others are left out.
    """
    latest = {
        (found["set"], found["kind"], found["minutes"]): found for found in results if found["windows"] == windows
    }
    head = ["## What search and auto keep", ""]
    if not latest:
        return "\n".join(
            [*head, "Not measured yet: `python -m benchmarks.quality auto --set four --by auto,search` does.", ""]
        )
    lines = [
        *head,
        "`merganser auto`, without a method being named, and a search over a weight of task arithmetic for each expert, in the minutes "
        "given: what they chose on the tune texts, measured on the test texts as every other row, mean / worst domain in percent. "
        "Beside them the average, and the row at published settings that keeps most. That one was picked by the same test texts, "
        "which favours it.",
        "",
        "| experts | by | minutes | items scored | chosen | keeps | the average | the best row as published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, kind, minutes), found in sorted(
        latest.items(), key=lambda each: ([*names].index(each[0][0]), *each[0][1:])
    ):
        own = [entry for entry in published.get(name, ()) if entry["label"] == "default" and entry["mean"] is not None]
        average = next((_brief(entry) for entry in own if entry["method"] == "linear"), "")
        best = max(own, key=lambda entry: entry["mean"], default=None)
        row = [
            names[name],
            kind,
            f"{minutes:g}",
            str(found["items"]),
            f"{found['winner']} ({found['method']})" if found["method"] not in found["winner"] else found["winner"],
            _kept(found),
            average,
            "" if best is None else f"{best['method']} {_brief(best)}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def _kept(found: Mapping[str, Any]) -> str:
    kept = found["retention"]
    if kept is None or kept["mean"] is None:
        return f"failed: {found['failed'] or 'no figure'}"
    mean, worst = kept["mean"], kept["worst"]
    instead = "" if found["recommended"] == "winner" else f" ({found['recommended']} was recommended)"
    return f"{100 * mean['value']:.0f} ± {100 * mean['stderr']:.0f} / {100 * worst['value']:.0f} ± {100 * worst['stderr']:.0f}{instead}"


def _brief(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['mean']:.0f} / {100 * entry['worst']['value']:.0f}"
