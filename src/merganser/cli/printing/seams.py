"""What is seen at the seams of a stacked model, as lines and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...wording import number_text, plural
from .text import head, say, table

if TYPE_CHECKING:
    from ...calibration.seams import SeamReport

_VERDICTS = {"none": "as in its model", "small": "within the change of one block"}


def seams_json(found: SeamReport) -> dict[str, Any]:
    """Return a report as plain data."""
    seams = [
        {
            **asdict(own.seam),
            **{name: value for name, value in asdict(own).items() if name != "seam"},
            "blocks": own.blocks if own.step > 0 else None,
            "verdict": own.verdict,
        }
        for own in found.seams
    ]
    return {**asdict(found), "out": str(found.out), "seams": seams, "best": found.best, "verdict": found.verdict}


def print_seams(found: SeamReport) -> None:
    """Print a report."""
    head(
        f"{plural(len(found.seams), 'seam')} · {plural(found.sequences, 'sequence')}, {plural(found.tokens, 'token')} · "
        f"perplexity {found.perplexity:.2f}"
    )
    if found.seams:
        rows = [["layer", "before | after", "norm", "expected", "then", "expected", "cosine", "error", "a block", ""]]
        for own in found.seams:
            after = ["", ""]
            if own.norm_after is not None and own.expected_norm_after is not None:
                after = [number_text(own.norm_after), number_text(own.expected_norm_after)]
            rows.append(
                [
                    str(own.seam.position),
                    f"{own.seam.before} | {own.seam.after}",
                    number_text(own.norm),
                    number_text(own.expected_norm),
                    *after,
                    f"{own.cosine:.3f}",
                    f"{own.error:.1%}",
                    f"{own.step:.1%}",
                    _VERDICTS.get(own.verdict, f"{own.blocks:.1f} times the change of a block"),
                ]
            )
        for line in table(rows, right=(0, 2, 3, 4, 5, 6, 7, 8)):
            say(line)
    say("perplexity")
    rows = [["the stack", f"{found.perplexity:.2f}"], *([name, f"{own:.2f}"] for name, own in found.models.items())]
    for line in table(rows, right=(1,)):
        say(line)
    say(found.verdict)
