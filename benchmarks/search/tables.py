"""The table of docs/search.md, from the results."""

from collections.abc import Iterable, Mapping, Sequence
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
    lines += [_waves(results[name], "") for name in sorted(key for key in results if key.startswith("waves"))]
    if "cma" in results:
        lines.append(_cma(results["cma"], ""))
    if "replay" in results:
        found = results["replay"]
        of = f", fitted to {found['points']} measured trials, which that misses by {found['error']:.3f}"
        lines += [_cma(found["cma"], of), *(_waves(own, of) for own in found["waves"])]
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


def _waves(found: Mapping[str, Any], of: str) -> str:
    rows = found["rows"]
    same = sum(_within(row["difference"]) for row in rows)
    return (
        f"| items scored with waves, of those without ({found['sampler']}, {_seeds(rows)} of {found['trials']} trials, "
        f"{found['items']} windows{of}) | {found['share']:.2f}; in {same} of {len(rows)} the winner is the same or within its error "
        f"(differences of what is kept: {_errors(row['difference'] for row in rows)}{_held(rows)}) |"
    )


def _cma(found: Mapping[str, Any], of: str) -> str:
    rows = found["rows"]
    pairs = ", ".join(f"{row['cma']:.3f} / {row['random']:.3f}" for row in rows)
    return (
        f"| CMA-ES over four weights beside random ones ({_seeds(rows)} of {found['trials']} trials, {found['items']} windows{of}) | "
        f"above in {found['above']} of {len(rows)}; kept by the best: {pairs}{_held(rows)} |"
    )


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(rows)} seed{'s' * (len(rows) > 1)}"


def _held(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the differences on windows that no trial saw, where they were measured."""
    held = [row["difference_held_out"] for row in rows if row["difference_held_out"] is not None]
    return f"; held out: {_errors(held)}" if held else ""


def _errors(differences: Iterable[Sequence[float]]) -> str:
    """Return differences with their errors, equal ones together."""
    texts = [_error(difference) for difference in differences]
    counts = {text: texts.count(text) for text in texts}
    return ", ".join(text if count == 1 else f"{count} times {text}" for text, count in counts.items())


def _within(difference: Sequence[float]) -> bool:
    value, error = difference
    return abs(value) <= 1.96 * error


def _error(difference: Sequence[float]) -> str:
    value, error = difference
    return "0" if value == 0 else f"{value:+.3f} ± {error:.3f}"
