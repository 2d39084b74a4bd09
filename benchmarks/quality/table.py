"""Tables of docs/quality.md, from results/."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import chosen as choices
from . import factors, plots, routed_table, settings

Result = Mapping[str, Any]

_START, _END = "<!-- quality:start -->", "<!-- quality:end -->"
_IMAGES = "images/quality-"
_SETS = {
    "two": "2 experts",
    "four": "4 experts",
    "eight": "8 experts",
    "adapters": "4 adapters",
    "pair": "conflicting pair",
}
_STAND_OUT = ("task_arithmetic", "ties", "linear", "optmerge")
_NAMES = {"default": "published", "tuned": "tuned"}


def mean_recovered(result: Result) -> tuple[float, float] | None:
    """Return the mean share of the experts' gain that a merge keeps, and its standard error."""
    mean = result["retention"] and result["retention"]["mean"]
    return None if mean is None or mean["value"] is None else (mean["value"], mean["stderr"])


def version(result: Result) -> int:
    """Return the version of the method that was measured; the first is not written down."""
    return int(result.get("version", 1))


def write(results: Path, docs: Path, config: Mapping[str, Any]) -> None:
    """Write the plots, and the tables between the markers of quality.md.

    Args:
        results: Folder of the results, a file for each set.
        docs: Folder of quality.md.
        config: The settings that were measured.

    Raises:
        FileNotFoundError: There are no results.
    """
    rows = {name: read(results / f"{name}.jsonl") for name in _SETS}
    every = {name: _with_fewer(_entries(own)) for name, own in rows.items()}
    entries = {name: [entry for entry in own if _shown(entry, config)] for name, own in every.items()}
    found = {name: own for name, own in entries.items() if any(entry["mean"] is not None for entry in own)}
    if not found:
        raise FileNotFoundError(f"{results}: no results; measure first: python -m benchmarks.quality run")
    images = docs / "images"
    for name, own in found.items():
        plots.recovered_and_forgotten(_title(name), own).save(images / f"quality-{name}.svg")
    parts = [_overview(found)]
    tuned = {name: _after_tuning(rows[name], own, config) for name, own in found.items()}
    parts += [_tuned({name: own for name, own in tuned.items() if own})] if any(tuned.values()) else []
    restored = {name: [entry for entry in own if entry["label"] == "restored"] for name, own in every.items()}
    parts += [_restored({name: own for name, own in restored.items() if own})] if any(restored.values()) else []
    parts += routed_table.tables({name: read(results / routed_table.FOLDER / f"{name}.jsonl") for name in _SETS}, _SETS)
    rounded = {e["method"]: _brief(e) for e in found.get("adapters", ()) if e["label"] == "default"}
    parts += [own] if (own := factors.table(results, config, rounded)) else []
    fewer = {name: _by_tokens(rows[name]) for name in found}
    parts += [_tokens({name: own for name, own in fewer.items() if own})] if any(fewer.values()) else []
    most = max(found, key=lambda name: plots.count_of(found[name]))
    plots.worst_domains(_title(most), found[most]).save(images / "quality-worst.svg")
    parts.append(f"![the worst domain of every method]({_IMAGES}worst.svg)\n")
    sizes = [found[name] for name in ("two", "four", "eight") if name in found]
    if len(sizes) > 1:
        plots.by_number(sizes, _STAND_OUT).save(images / "quality-number.svg")
        parts.append(f"![the number of experts]({_IMAGES}number.svg)\n")
    parts.append(choices.section(read(results / choices.FILE), every, _SETS, config["windows"]))
    parts += [_section(name, own) for name, own in found.items()]
    page = docs / "quality.md"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(_START)
    tail = rest.partition(_END)[2]
    page.write_text("\n".join([f"{head}{_START}", *parts, f"{_END}{tail}"]), encoding="utf-8")


def _shown(entry: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether an entry belongs in the tables of merged models: what is measured there, at today's settings."""
    method, setting = entry["method"], entry["result"]["setting"]
    if entry["label"] not in _NAMES or method in config["left_out"]:
        return False
    published = settings.published(config, method)
    return setting == published if entry["label"] == "default" else settings.is_variant(config, method, setting)


def _with_fewer(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries, without those whose statistics are of fewer tokens than usual, where there is one of the usual number.

    Where a method has none of the usual number, its entry of the most tokens stands for it: under the usual label, "default" or
    "tuned", and with the mark `fewer`.
    """
    found: dict[tuple[str, str], Mapping[str, Any]] = {(e["method"], e["label"]): e for e in entries if not _few(e)}
    for entry in sorted(filter(_few, entries), key=_tokens_of, reverse=True):
        label = "tuned" if entry["label"].startswith("tuned") else "default"
        found.setdefault((entry["method"], label), {**entry, "label": label, "fewer": True})
    return sorted(found.values(), key=_order)


def _few(entry: Mapping[str, Any]) -> bool:
    return bool(entry["label"].endswith("sequences"))


def _tokens_of(entry: Mapping[str, Any]) -> int:
    """Return the tokens of each text that statistics were taken of."""
    drawn = entry["result"]["calibration"]
    return int(drawn["sequences"] * drawn["length"])


def _order(entry: Mapping[str, Any]) -> float:
    """Return what sorts the best first, and what failed last."""
    return -entry["mean"] if entry["mean"] is not None else float("inf")


def _overview(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write one table of all sets: mean and worst at published settings."""
    return _by_set(
        "Share of the experts' gain that is kept at published settings, in percent: mean of the domains / worst domain. "
        "A dagger: measured with an earlier version of the method. A double dagger: with statistics of fewer tokens "
        "than usual, since those of all were not taken yet; how many, the table by tokens says.",
        {
            name: {entry["method"]: _brief(entry) for entry in entries if entry["label"] == "default"}
            for name, entries in found.items()
        },
    )


def _tuned(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write one table of all sets: mean and worst at the settings that tuning chose."""
    return _by_set(
        "The same after one parameter was tuned: the value that kept most on the tune texts, measured on the test texts. "
        "A star marks the published value.",
        {
            name: {e["method"]: f"{_brief(e)}{'*' if e['label'] == 'default' else ''}" for e in entries}
            for name, entries in found.items()
        },
    )


def _restored(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write the table of methods with sidecars, where each task has its model again."""
    return _by_set(
        "Methods with sidecars, each task restored and measured on its own domain: mean / worst domain, in percent; then what "
        "is stored beside the shared model, in percent of the experts' bytes.",
        {
            name: {
                e["method"]: f"{_brief(e)}; {100 * e['result']['stored_share']:.0f}"
                for e in entries
                if e["mean"] is not None
            }
            for name, entries in found.items()
        },
    )


def _by_tokens(results: Sequence[Result]) -> dict[str, dict[int, str]]:
    """Return what each number of tokens keeps, of methods with statistics from data that were measured on fewer, too.

    Settings that are not the method's own defaults are behind its name, and those that were tuned on so few in a row of
    their own.
    """
    found: dict[str, dict[int, str]] = {}
    fewer = {one["method"] for one in results if one["label"].endswith("sequences")}
    for entry in _entries(results):
        drawn = entry["result"].get("calibration")
        if drawn is not None and entry["label"] != "tuned" and entry["method"] in fewer:
            tuned = ", tuned" if entry["label"].startswith("tuned") else ""
            name = f"{entry['method']}{tuned}{_setting(entry['result'])}"
            found.setdefault(name, {})[drawn["sequences"] * drawn["length"]] = _brief(entry)
    return found


def _tokens(found: Mapping[str, Mapping[str, Mapping[int, str]]]) -> str:
    """Write the table of methods with statistics from data, by the tokens of each expert that they are measured on."""
    counts = sorted({count for own in found.values() for cells in own.values() for count in cells}, reverse=True)
    lines = [
        "Methods with statistics from data, by the number of tokens of each expert's train text that these are measured on:",
        "mean / worst domain, in percent. Behind the name, what is not the method's own default.",
        "",
        f"| | method | {' | '.join(f'{count:,}' for count in counts)} |",
        f"|---|---|{'---|' * len(counts)}",
    ]
    for name, own in found.items():
        lines += [
            f"| {_SETS[name]} | {method} | {' | '.join(cells.get(count, '') for count in counts)} |"
            for method, cells in own.items()
        ]
    return "\n".join([*lines, ""])


def _by_set(caption: str, cells: Mapping[str, Mapping[str, str]]) -> str:
    """Write a table with a column for each set and a row for each method, in the order of the set of four."""
    first = "four" if "four" in cells else next(iter(cells))
    order = dict.fromkeys([*cells[first], *(method for own in cells.values() for method in own)])
    lines = [caption, "", f"| method | {' | '.join(_SETS[name] for name in cells)} |", f"|---|{'---|' * len(cells)}"]
    lines += [f"| {method} | {' | '.join(own.get(method, '') for own in cells.values())} |" for method in order]
    return "\n".join([*lines, ""])


def _brief(entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "failed"
    return f"{100 * entry['mean']:.0f} / {100 * entry['worst']['value']:.0f}{_marks(entry)}"


def _marks(entry: Mapping[str, Any]) -> str:
    """Return a dagger where the method has a later version than the one that was measured; a double one for fewer tokens than usual."""
    later = version(entry["result"]) != settings.method_of(entry["method"]).version
    return ("†" if later else "") + ("‡" if entry.get("fewer") else "")


def read(file: Path) -> list[dict[str, Any]]:
    """Return the results of a set; a line that was cut off by a kill is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found


def drop_rest(file: Path) -> None:
    """Cut off a line that a kill left unfinished, so that the next one does not become part of it."""
    if file.exists():
        whole = file.read_bytes()
        if not whole.endswith(b"\n"):
            file.write_bytes(whole[: whole.rfind(b"\n") + 1])


def compared(before: Path, now: Path) -> str:
    """Return, for each result of `now`, its figures beside those of `before`, a line each."""
    known = {_key(found): found for found in read(before)}
    lines = []
    for found in read(now):
        method, label, _, seed = _key(found)
        both = " · ".join(
            f"{name} {figures(result)}" for name, result in (("now", found), ("before", known.get(_key(found))))
        )
        lines.append(f"{method}, {label}, seed {seed}: mean / worst in percent: {both}")
    return "\n".join(lines)


def _key(found: Result) -> tuple[Any, ...]:
    return found["method"], found["label"], json.dumps(found["setting"]), found["seed"]


def figures(found: Result | None) -> str:
    """Return mean and worst domain, in percent."""
    if found is None:
        return "not measured"
    mean = mean_recovered(found)
    if mean is None:
        return f"failed: {found['failed']}"
    return f"{100 * mean[0]:.2f} / {100 * found['retention']['worst']['value']:.2f}"


def _entries(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return one entry per method and setting that was measured on the test texts, the best first."""
    # what was measured again, with other settings, counts
    latest = {(found["method"], found["label"], found["seed"]): found for found in results if found["split"] == "test"}
    newest: dict[str, int] = {}
    for (method, _, _), found in latest.items():
        newest[method] = max(version(found), newest.get(method, 0))
    groups: dict[tuple[str, str], list[Result]] = {}
    for (method, label, _), result in latest.items():
        # rows of different versions of a method cannot be compared
        if version(result) == newest[method]:
            groups.setdefault((method, label), []).append(result)
    entries = [_entry(method, label, seeds) for (method, label), seeds in groups.items()]
    return sorted(entries, key=_order)


def _after_tuning(
    results: Sequence[Result], entries: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Return, of methods whose whole grid was tried, the entry of the settings that were best on the tune texts."""
    chosen = []
    for entry in entries:
        method = entry["method"]
        tried = [
            (found["setting"], mean_recovered(found) or (float("-inf"),))
            for found in results
            if (found["split"], found["method"]) == ("tune", method)
            and version(found) == version(entry["result"])
            and found.get("calibration") == entry["result"].get("calibration")
            and settings.is_variant(config, method, found["setting"])
        ]
        grid = settings.grid(config, method)
        if not grid or not all(one in [setting for setting, _ in tried] for one in grid):
            continue
        if entry["result"]["setting"] == max(tried, key=lambda one: one[1])[0]:
            chosen.append(entry)
    return chosen


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


def _title(name: str) -> str:
    return f"{_SETS[name][0].upper()}{_SETS[name][1:]}"


def _section(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    experts = next(e["result"]["retention"]["recovered"] for e in entries if e["mean"] is not None)
    lines = [
        f"## {_title(name)}: {', '.join(experts)}",
        "",
        f"![recovered against forgotten]({_IMAGES}{name}.svg)",
        "",
        "<details><summary>Settings and standard errors</summary>",
        "",
        "| method | settings | recovered, mean | worst domain | forgotten | merge, s |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        shown = f"{_NAMES[entry['label']]}{_marks(entry)}{_setting(entry['result'])}"
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
        "</details>",
        "",
        f"Measured on {hardware['processor']}, {hardware['processors']} cores, {hardware['date']}; {len(entries)} rows.",
        "",
    ]
    return "\n".join(lines)


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def _setting(result: Result) -> str:
    setting = {**result["setting"]["each"], **result["setting"]["shared"]}
    return ": " + ", ".join(f"{key} {_value(value)}" for key, value in setting.items()) if setting else ""


def _value(value: bool | float | str) -> str:
    return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"
