"""The verdict: what the merge kept and lost, beside the average and the best single model."""

from __future__ import annotations

from pathlib import Path

from ..errors import MergeError
from ..evaluation.stored import Estimate, EvaluatedModel, Evaluation, Retention
from ..record.reading import Record, read_record
from .blocks import Block, Cell, Code, List, Number, Paragraph, Section, Table, estimate, share
from .scores import own_model

__all__ = ["verdict_section"]

_AVERAGES = ("average", "linear", "mean", "soup")
"""Names that say that a model is the average; others are read from the run record of the model."""


def verdict_section(record: Record, evaluation: tuple[Evaluation, str] | None, length: str) -> Section:
    """Return the first section.

    Args:
        record: The run record.
        evaluation: An evaluation, and the merge's hash in it; None without an evaluation.
        length: The text that compares the length of the merged task vector with sums and averages; empty
            if it was not measured.
    """
    blocks: list[Block] = []
    if evaluation is None:
        blocks.append(Paragraph("What this merge can do was not measured. To see it here:"))
        blocks.append(
            Code(
                f"merganser eval {record.out} --tasks TASK=FILE.txt ... --base BASE --experts TASK=MODEL ... "
                f"--json eval.json\nmerganser report {record.out} --eval eval.json --overwrite"
            )
        )
        if length:
            blocks.append(Paragraph(length))
    else:
        blocks += _of_evaluation(record, *evaluation)
    if record.warnings:
        blocks.append(List("warnings", record.warnings))
    return Section("Verdict", blocks)


def _of_evaluation(record: Record, found: Evaluation, own_hash: str) -> list[Block]:
    own, said = own_model(record, found, own_hash)
    if own is None:
        return [Paragraph(said)]
    if own.failed:
        return [Paragraph(f"This merge could not be scored: {own.failed}")]
    kept = found.retention.get(own.name)
    if kept is None or kept.mean is None:
        return [Paragraph("What it kept of the models is measured if eval gets both --base and --experts.")]
    rows: list[list[Cell]] = []
    for model, label in _compared(found, own):
        own_kept = found.retention.get(model.name)
        if own_kept is not None:
            worst = estimate(own_kept.worst, percent=True)
            rows.append([label, estimate(own_kept.mean, percent=True), worst, _forgot(own_kept)])
    head = ["", "kept", "worst", "forgotten"]
    text = _sentence(kept) + _beside(found, own, kept)
    return [Paragraph(text), Table(head, rows, f"{found.file.name}: retention.models")]


def _sentence(kept: Retention) -> str:
    """Return the verdict in words."""
    assert kept.mean is not None
    text = f"Kept {share(kept.mean)} of what the experts gained, on average over their domains"
    if kept.worst is not None:
        text += f"; the least on {kept.worst.about or 'one domain'}, {share(kept.worst)}"
    if kept.mean_forgotten is not None and kept.mean_forgotten.value is not None:
        lost = kept.mean_forgotten.value
        text += f". It {'forgot' if lost > 0 else 'gained'} {abs(lost):.1%} on tasks without an expert"
    return f"{text}. {_against(kept.against_best_single)}".rstrip()


def _against(found: Estimate | None) -> str:
    """Return whether the merge keeps more than the best single model does."""
    if found is None or found.value is None:
        return ""
    if found.stderr is not None and abs(found.value) <= 2 * found.stderr:
        return "Whether it keeps more than the best single model is not sure (less than two standard errors apart)."
    return f"It keeps {'more' if found.value > 0 else 'less'} than the best single model."


def _beside(found: Evaluation, own: EvaluatedModel, kept: Retention) -> str:
    """Return a sentence if the average keeps more than the merge."""
    for model, label in _compared(found, own)[1:]:
        other = found.retention.get(model.name)
        if label.startswith("average") and other is not None and other.mean is not None and kept.mean is not None:
            one, two = other.mean.value, kept.mean.value
            if one is not None and two is not None and one > two:
                return f" The plain average keeps more: {share(other.mean)}."
    return ""


def _compared(found: Evaluation, own: EvaluatedModel) -> list[tuple[EvaluatedModel, str]]:
    """Return the merge, the average and the best single model, as far as they were evaluated, with labels."""
    rows = [(own, "this merge")]
    rows += [
        (m, "average" if m.name == "average" else f"average ({m.name})")
        for m in found.models
        if m is not own and _is_average(m)
    ][:1]
    rows += [(m, f"best single model ({m.name})") for m in found.models if m.name == found.best_single]
    return rows


def _is_average(model: EvaluatedModel) -> bool:
    if model.role != "model" or model.failed:
        return False
    if model.name.lower() in _AVERAGES:
        return True
    try:
        return model.kind == "checkpoint" and read_record(Path(model.reference).expanduser()).method == "linear"
    except (MergeError, OSError, RuntimeError, ValueError):
        return False


def _forgot(kept: Retention) -> Number:
    found = kept.mean_forgotten
    if found is None:
        return Number(None, "-")
    return Number(found.value, share(found), found.place)
