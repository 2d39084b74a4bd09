"""Print what `route` made: a router, gates, or a mixture of experts of unequal sizes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ...wording import count_text, plural, size_text, time_text
from .text import head, say, say_json, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...runtime.routed.gated.making import GateReport
    from ...runtime.routed.making import Routing
    from ...runtime.routed.unequal.making import MixtureReport

__all__ = ["print_gates", "print_mixture", "print_router"]


def print_router(found: Routing, seconds: float, *, quiet: bool, json: bool) -> None:
    """Print what a router chooses for held-out text."""
    if json:
        say_json(
            {
                "file": str(found.file),
                "length": found.length,
                "tasks": {
                    task: {"fitted": found.fitted[task], "right": found.right(task), "chosen": chosen}
                    for task, chosen in found.chosen.items()
                },
            }
        )
        return
    if quiet:
        return
    head(f"router of {plural(len(found.chosen), 'task')} · {time_text(seconds)}")
    say(f"choices for held-out windows of {found.length} tokens")
    rows = [["text of", "made from", "held out", "right", *(f"-> {task}" for task in found.chosen)]]
    for task, chosen in found.chosen.items():
        counts = [str(chosen.get(other, 0)) for other in found.chosen]
        rows.append(
            [task, str(found.fitted[task]), str(sum(chosen.values())), f"{100 * found.right(task):.1f} %", *counts]
        )
    for line in table(rows):
        say(line)
    say(f"wrote {found.file}")


def print_gates(report: GateReport, kind: str, what: str, seconds: float, *, quiet: bool, json: bool) -> None:
    """Print what gates do on held-out text."""
    if json:
        say_json({**asdict(report), "file": str(report.file)})
        return
    if quiet:
        return
    head(f"{kind} gates of {plural(len(report.right), 'task')} · {time_text(seconds)}")
    say(f"{what}, {size_text(report.part_bytes)}")
    if report.unused:
        say(f"{plural(report.unused, 'other tensor')} of the tasks are not used: those of the shared model stay")
    _say_training(report.trained)
    say(f"held-out windows of {report.length} tokens; nats per token")
    rows = [
        ["text of", "made from", "right", "shared", "told", "gates", *(f"share of {task}" for task in report.right)]
    ]
    for task, right in report.right.items():
        losses = [f"{report.loss[task][name]:.3f}" for name in ("shared", "told", "gates")]
        shares = [f"{share:.2f}" for share in report.shares[task].values()]
        rows.append([task, str(report.fitted[task]), f"{100 * right:.1f} %", *losses, *shares])
    for line in table(rows):
        say(line)
    say(f"wrote {report.file}")


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
    _say_training(report.trained)
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


def _say_training(losses: Sequence[float]) -> None:
    """Print how the loss changed over training, from the mean of its first tenth to that of its last; nothing without training."""
    if losses:
        tenth = max(1, len(losses) // 10)
        first, last = (sum(own) / tenth for own in (losses[:tenth], losses[-tenth:]))
        say(f"{plural(len(losses), 'step')} of training: from {first:.3f} to {last:.3f}")
