"""Describe what a change of vocabulary does: counts for the plan, and the list of every token that moved or was made."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...wording import plural, some
from ..plan.sections.vocabulary import ModelChange, VocabularyChange
from .mapping import ModelRows
from .output import OutputVocabulary
from .tokens import Tokens, shown_token

__all__ = ["describe"]


def describe(
    out: OutputVocabulary,
    models: Sequence[Tokens],
    rows: Sequence[ModelRows],
    settings: Mapping[str, Any] | None = None,
) -> tuple[VocabularyChange, list[str]]:
    """Return a change of vocabulary as data, and warnings about tokens that models lack or lose.

    Args:
        out: The output's vocabulary.
        models: The tokens of the models.
        rows: Where their rows come from.
        settings: How the rows of new tokens are made, if a method makes them.
    """
    found = []
    warnings = []
    for tokens, each in zip(models, rows, strict=True):
        here = int((each.own == np.arange(len(each.own))).sum())
        lost = [shown_token(token) for _, token in sorted(each.lost.items())]
        counts = Counter(made.kind for made in each.made.values())
        found.append(
            ModelChange(
                model=str(tokens.reference),
                rows=tokens.rows,
                kept=here,
                moved=each.moved,
                made=dict(counts),
                lost=len(lost),
                lost_tokens=tuple(lost[:4]),
            )
        )
        if lost:
            warnings.append(
                f"{tokens.reference}: {plural(len(lost), 'token')} that the output's tokenizer does not have, left out with "
                f"what was learned of them: {some(lost)}"
            )
    names = {number: token for token, number in out.ids.items()}
    if unknown := [shown_token(names[row]) for row in sorted(_made_by_all(rows)) if row in names]:
        warnings.append(
            f"{plural(len(unknown), 'token')} that no model has, made without knowledge of what they mean: {some(unknown)}; "
            "merganser transplant makes such rows from a model that knows them"
        )
    report = _report(out, models, rows, names)
    change = VocabularyChange(
        owner=str(out.owner),
        tokens=len(out.ids),
        rows=out.rows,
        added=len(out.added),
        models=tuple(found),
        report=report,
        digest=hashlib.sha256(b"\0".join([report, *out.texts.values()])).hexdigest(),
        texts=out.texts,
        stale=out.stale,
        settings=settings,
    )
    return change, warnings


def _made_by_all(rows: Sequence[ModelRows]) -> set[int]:
    """Return the rows that no model has, and that are not taken from another one."""
    every = [{row for row, made in each.made.items() if not made.terms} for each in rows]
    return set.intersection(*every)


def _report(out: OutputVocabulary, models: Sequence[Tokens], rows: Sequence[ModelRows], names: dict[int, str]) -> bytes:
    """Return the list of every row that moved or was made, and of every token that was lost, as JSON."""
    labels = [str(tokens.reference) for tokens in models]
    changed = np.zeros(out.rows, bool)
    for each in rows:
        changed |= each.own != np.arange(out.rows)
    lines = []
    for row in np.flatnonzero(changed).tolist():
        sources: dict[str, dict[str, Any]] = {}
        for label, each in zip(labels, rows, strict=True):
            if each.own[row] >= 0:
                sources[label] = {"row": int(each.own[row])}
            else:
                made = each.made[row]
                terms = [{"model": labels[model], "row": number} for model, number in made.terms or ()]
                sources[label] = {"made": made.kind, **({"of": terms} if terms else {})}
        entry = {"row": row, "token": names.get(row), "from": sources}
        if names.get(row) in out.added:
            entry["new"] = True
        lines.append(json.dumps(entry))
    lost = {
        label: [{"row": n, "token": t} for n, t in sorted(e.lost.items())]
        for label, e in zip(labels, rows, strict=True)
    }
    head = {"tokenizer_of": str(out.owner), "tokens": len(out.ids), "rows": out.rows, "models": labels}
    body = ",\n".join(lines)
    return (
        f'{json.dumps(head)[:-1]},\n"changed": [\n{body}\n],\n"lost": {json.dumps({k: v for k, v in lost.items() if v})}}}\n'
    ).encode()
