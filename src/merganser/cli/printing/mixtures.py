"""Print mixtures of experts of unequal sizes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ...wording import count_text, plural, time_text
from .text import head, say, say_json, table

if TYPE_CHECKING:
    from ...runtime.routed.unequal.making import MixtureReport

__all__ = ["print_mixture"]


def print_mixture(report: MixtureReport, seconds: float, *, quiet: bool, json: bool) -> None:
    """Print what a mixture of unequal experts does on held-out text."""
    if json:
        say_json({**asdict(report), "file": str(report.file)})
        return
    if quiet:
        return
    settings = report.settings
    head(f"mixture of {plural(len(report.right), 'expert')} · {time_text(seconds)}")
    say(f"parameters: {', '.join(f'{task} {count_text(count)}' for task, count in report.parameters.items())}")
    say(
        f"by {settings.by}, {settings.embeddings} embeddings, {plural(settings.top or len(report.right), 'expert')} per text"
    )
    if report.trained:
        tenth = max(1, len(report.trained) // 10)
        first, last = (sum(own) / tenth for own in (report.trained[:tenth], report.trained[-tenth:]))
        say(f"{plural(len(report.trained), 'step')} of training: from {first:.3f} to {last:.3f}")
    say(f"held-out windows of {report.length} tokens; nats per token")
    losses = next(iter(report.loss.values()))
    rows = [["text of", "made from", "right", *losses, *(f"share of {task}" for task in report.right)]]
    for task, right in report.right.items():
        own = [f"{loss:.3f}" for loss in report.loss[task].values()]
        shares = [f"{share:.2f}" for share in report.shares[task].values()]
        rows.append([task, str(report.fitted[task]), f"{100 * right:.1f} %", *own, *shares])
    for line in table(rows):
        say(line)
    say(f"wrote {report.file}")
