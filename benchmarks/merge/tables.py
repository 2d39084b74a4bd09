"""The tables of docs/speed.md."""

from collections.abc import Mapping, Sequence
from typing import Any

START = "<!-- bench:start -->"
END = "<!-- bench:end -->"

Entry = Mapping[str, Any]


def tables(found: Mapping[str, Entry]) -> str:
    """Return the measurements as Markdown, with the markers around them.

    Args:
        found: Contents of the result files, by scenario.
    """
    makers = {
        "methods": _methods,
        "peer": _beside,
        "peer-small": _beside,
        "peer-large": _beside,
        "max-memory": _max_memory,
        "many-tensors": _many_tensors,
        "plan-70b": _plan,
        "scaling": _scaling,
        "kills": _kills,
    }
    parts = [make(found[name]) for name, make in makers.items() if name in found]
    return "\n\n".join([START, *parts, END]) + "\n"


def _methods(result: Entry) -> str:
    config, entries = result["config"], result["results"]
    size = config["shape"]["parameters"] / 1e9
    with_peer = any("peer" in entry for entry in entries)
    rows = []
    for entry in entries:
        if "error" in entry:
            rows.append([entry["method"], f"failed ({entry['error']})"])
            continue
        rows.append(
            [
                entry["method"],
                f"{entry['floor']['median']:.1f}",
                f"{entry['above_startup']['median']:.1f}",
                _range(entry["ratio"]),
                f"{entry['bar']:g}",
                f"{entry['peak_mb']:.0f}",
                f"{entry['first']['seconds']:.1f}",
                f"{entry['seconds']['median']:.1f}",
                *(_peer(entry) if with_peer else []),
                *([_range(entry["cold"]["ratio"])] if "cold" in entry else []),
            ]
        )
    head = [
        "method",
        "floor, s",
        "merge, s",
        "x floor",
        "bar",
        "peak, MB",
        "first run, whole, s",
        "later runs, whole, s",
    ]
    if with_peer:
        head += ["mergekit, whole, s", "merganser is faster by", "mergekit's peak, MB"]
    if any("cold" in entry for entry in entries):
        head.append("cold, x floor")
    starts = [entry["startup"]["median"] for entry in entries if "startup" in entry]
    start = f"; start-up, {min(starts):.1f} to {max(starts):.1f} s, is not in `merge`" if starts else ""
    text = (
        f"Up to {config['models']} models and a base of {size:.2f} B parameters, bfloat16, inputs in the page cache, "
        f"median (least–largest) of {config['runs']} {'run' if config['runs'] == 1 else 'runs'}{start}. Whole commands "
        f"include it. {_machine(result)}"
    )
    if with_peer:
        text += " The factor compares whole commands, later runs."
    return f"{text}\n\n{_table(head, rows)}"


def _beside(result: Entry) -> str:
    return (
        "Beside mergekit, each after the other; its gigabytes push inputs out of the page cache, which may change our "
        f"figures.\n\n{_methods(result)}"
    )


def _peer(entry: Entry) -> list[str]:
    if "peer" not in entry:
        return ["", "", ""]
    peer = entry["peer"]
    return [f"{peer['seconds']['median']:.1f}", f"{entry['faster']:.1f} x", f"{peer['peak_mb']:.0f}"]


def _max_memory(result: Entry) -> str:
    rows = [
        [
            entry["method"],
            f"{entry['above_startup']['median']:.1f}",
            f"{entry['limited']['above_startup']['median']:.1f}",
            f"{entry['time_ratio']:.2f}",
            f"{entry['peak_mb']:.0f}",
            f"{entry['limited']['peak_mb']:.0f}",
        ]
        for entry in result["results"]
        if "error" not in entry
    ]
    limit = result["config"]["limit"]
    head = ["method", "merge, s", f"within {limit}, s", "ratio", "peak, MB", f"peak within {limit}, MB"]
    return f"With `--max-memory {limit}`, the same models:\n\n{_table(head, rows)}"


def _many_tensors(result: Entry) -> str:
    config = result["config"]
    rows = [
        [entry["method"], f"{entry['seconds']['median']:.1f}", f"{entry['above_startup']['median']:.1f}"]
        for entry in result["results"]
        if "error" not in entry
    ]
    head = ["method", "whole command, s", "above start-up, s"]
    title = f"{config['tensors']:,} tensors of {config['elements']:,} elements, {config['models']} models:"
    return f"{title}\n\n{_table(head, rows)}"


def _plan(result: Entry) -> str:
    config = result["config"]
    rows = [
        [entry["method"], f"{entry['seconds']['median']:.2f}", f"{entry['peak_mb']:.0f}"]
        for entry in result["results"]
        if "error" not in entry
    ]
    title = (
        f"`merganser plan` for {config['models']} models in the shape of a 70 B model, {config['shards']} files each "
        "(whole command):"
    )
    return f"{title}\n\n{_table(['method', 's', 'peak, MB'], rows)}"


def _scaling(result: Entry) -> str:
    names = {"size": "billion parameters", "models": "models", "threads": "threads"}
    rows = [
        [
            f"{names[entry['axis']]}: {entry['value']:g}",
            entry["method"],
            f"{entry['floor']['median']:.1f}",
            f"{entry['above_startup']['median']:.1f}",
            _range(entry["ratio"]),
            f"{entry['peak_mb']:.0f}",
            f"{entry['cached']:.0%}",
        ]
        for entry in sorted(result["results"], key=lambda entry: list(names).index(entry["axis"]))
        if "error" not in entry
    ]
    head = ["", "method", "floor, s", "merge, s", "x floor", "peak, MB", "inputs in the page cache"]
    return f"Scaling:\n\n{_table(head, rows)}"


def _kills(result: Entry) -> str:
    rows = [
        [
            entry["method"],
            f"{entry['seconds']['median']:.1f}",
            ", ".join(f"{seconds:.1f}" for seconds in entry["killed_after"]),
            f"{entry['last']:.1f}",
        ]
        for entry in result["results"]
        if "error" not in entry
    ]
    head = ["method", "whole command, s", "killed after, s", "last run, s"]
    return (
        "Killed (`kill -9`) at random moments and continued by the same command; the bytes were those of a run that nobody "
        f"killed:\n\n{_table(head, rows)}"
    )


def _machine(result: Entry) -> str:
    hardware = result["hardware"]
    return (
        f"{hardware['processor']}, {hardware['processors']} processors, {hardware['memory_gb']:.0f} GB, "
        f"{hardware['filesystem']}, torch {hardware['versions']['torch']}, {hardware['date']}."
    )


def _range(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
