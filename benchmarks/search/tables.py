"""The table of docs/search.md, from the results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_START, _END = "<!-- bench:start -->", "<!-- bench:end -->"


def write(results: Mapping[str, Any], page: Path) -> None:
    """Write the table between the markers of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(_START)
    tail = rest.partition(_END)[2]
    page.write_text(f"{head}{_START}\n{table(results)}\n{_END}{tail}", encoding="utf-8")


def table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["| | measured |", "|---|---|"]
    if "trial" in results:
        found = results["trial"]
        trial, written, scoring = (found[name] for name in ("trial", "written", "scoring"))
        whole, both = trial + scoring, written + scoring
        same = "the scores of all items are the same" if found["same"] else "scores of some items differ"
        lines.append(
            f"| a trial, beside `merge` and `from_pretrained` ({same}) | {trial:.2f} beside {written:.2f} CPU s: {trial / written:.2f}; "
            f"with {found['items']} windows of {found['context']} tokens scored by both {whole:.2f} beside {both:.2f}: {whole / both:.2f} |"
        )
    for name in sorted(key for key in results if key.startswith("waves")):
        found = results[name]
        same = sum(_within(row["difference"]) for row in found["rows"])
        lines.append(
            f"| items scored with waves, of those without ({found['sampler']}, seeds: {len(found['rows'])}, each of {found['trials']} "
            f"trials, {found['items']} windows) | {found['share']:.2f}; in {same} of {len(found['rows'])} the winner is the same or "
            f"within its error (differences of what is kept: {', '.join(_error(row['difference']) for row in found['rows'])}; held out: "
            f"{', '.join(_error(row['difference_held_out']) for row in found['rows'])}) |"
        )
    if "cma" in results:
        found = results["cma"]
        pairs = ", ".join(f"{row['cma']:.3f} / {row['random']:.3f}" for row in found["rows"])
        held = ", ".join(_error(row["difference_held_out"]) for row in found["rows"])
        lines.append(
            f"| CMA-ES over four weights beside random ones, {found['trials']} trials each ({found['items']} windows) | kept by the best: "
            f"{pairs}; above in {found['above']} of {len(found['rows'])} seeds; on windows that no trial saw the difference is {held} |"
        )
    if "replay" in results:
        found = results["replay"]
        lines.append(
            f"| CMA-ES over four weights beside as many random trials, on a quadratic fitted to {found['points']} measured trials (which it misses by {found['error']:.3f}), {found['trials']} trials "
            f"each | above in {found['above']} of {found['seeds']} seeds |"
        )
    hardware = results["hardware"]
    where = f"{hardware['processor']}, {hardware['processors']} cores, {hardware['date']}"
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"Measured on {where}, beside other work; SmolLM2-135M and the four adapters of the repository.",
        ]
    )


def _within(difference: list[float]) -> bool:
    value, error = difference
    return abs(value) <= 1.96 * error


def _error(difference: list[float]) -> str:
    value, error = difference
    return "0" if value == 0 else f"{value:+.3f} ± {error:.3f}"
