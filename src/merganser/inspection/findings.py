"""Explain in sentences what measured distances between models mean for a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from ..wording import digits_text, number_text
from .difference import Difference
from .task_vectors import FAR, Kinship

__all__ = ["Finding", "difference_findings", "kinship_findings"]

SHARED_COSINE = 0.5
"""Smallest cosine of the weight matrices of two models that still suggests a shared base.

Independently initialised matrices have a cosine near 0, those of a fine-tuned model and its base near 1. At 0.5, the
part of the matrices that is orthogonal to the base has 87 % of their norm. We chose the middle of the range.
"""

NEARLY_SAME = 0.1
"""Two models closer than this share of the shorter task vector are reported as nearly the same; our choice."""

MANY_FAR = 0.1
"""Task vectors with more than this share of elements beyond `FAR` are reported as large.

This share is our choice, since DARE's authors give only the range. In eight fine-tunes of a 135 M model (120 steps of
1,024 tokens) at most 4 % of the elements were beyond it.
"""

_DARE = (
    f"DARE's authors found the changes of fine-tuned models within {FAR}, and dropping much less effective where they "
    "reach 0.03 (arXiv:2311.03099): compare the merge with one by task_arithmetic before trusting a sparsifying method"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact that a user should know before merging.

    Args:
        kind: Kind of the finding.
        models: The models concerned, counted from 1; 0 is the base (for `diff`, 1 is A and 2 is B).
        text: The finding in a sentence, with the numbers.
    """

    kind: Literal["copy", "nearly the same", "no shared base", "large deltas", "mixed dtypes"]
    models: Sequence[int]
    text: str


def kinship_findings(found: Kinship) -> list[Finding]:
    """Return the findings that follow from a kinship."""
    strangers = [i for i, cosine in enumerate(found.matrices.base_cosine) if cosine is not None and _stranger(cosine)]
    return [
        *_copies(found),
        *_nearly_same(found),
        *_strangers(found, strangers),
        *_large(found, strangers),
        *_dtypes(found),
    ]


def difference_findings(found: Difference) -> list[Finding]:
    """Return the findings that follow from a difference."""
    if found.total.identical or found.total.relative_change is None:
        return []
    if found.total.largest == 0:
        return [Finding("copy", [1, 2], "A and B are copies of each other in different dtypes: every value is equal")]
    cosine = found.matrices.cosine
    if cosine is not None and _stranger(cosine):
        text = f"A and B seem to share no base: the cosine of their weight matrices is {cosine:.3g}"
        return [Finding("no shared base", [1, 2], text)]
    if found.far is not None and found.far > MANY_FAR:
        text = f"{_percent(found.far)} of the elements differ by more than {FAR}. If A is the base of B: {_DARE}"
        return [Finding("large deltas", [1, 2], text)]
    return []


def _stranger(cosine: float) -> bool:
    return cosine < SHARED_COSINE


def _copies(found: Kinship) -> list[Finding]:
    findings = []
    for group in found.same:
        original, *copies = group
        be = "is a copy" if len(copies) == 1 else "are copies"
        text = f"{_list(copies)} {be} of {_name(original)}: every value that was compared is equal"
        findings.append(Finding("copy", group, text))
    return findings


def _nearly_same(found: Kinship) -> list[Finding]:
    findings = []
    equal = [set(group) for group in found.same]
    for i, j in combinations(range(len(found.models)), 2):
        shorter = min(found.total.norm[i], found.total.norm[j])
        apart = found.total.distance[i][j]
        if apart is None or apart >= NEARLY_SAME * shorter or any({i + 1, j + 1} <= group for group in equal):
            continue
        text = (
            f"{_list([i + 1, j + 1])} are nearly the same: they are {_percent(apart / shorter)} of a task vector "
            "apart, so a merge counts one model twice"
        )
        findings.append(Finding("nearly the same", [i + 1, j + 1], text))
    return findings


def _strangers(found: Kinship, strangers: Sequence[int]) -> list[Finding]:
    findings = []
    for i in strangers:
        change = found.matrices.change[i]
        text = (
            f"{_name(i + 1)} seems to share no base with the others: the cosine of its weight matrices and the base's "
            f"is {found.matrices.base_cosine[i]:.3g}, and its task vector has {number_text(change)} times the norm "
            "of the base"
        )
        findings.append(Finding("no shared base", [i + 1], text))
    for i, j in combinations(strangers, 2):
        cosine = found.matrices.weight_cosine[i][j]
        if cosine is not None and not _stranger(cosine):
            text = (
                f"{_list([i + 1, j + 1])} may share another base: the cosine of their weight matrices is {cosine:.3g}"
            )
            findings.append(Finding("no shared base", [i + 1, j + 1], text))
    return findings


def _large(found: Kinship, strangers: Sequence[int]) -> list[Finding]:
    large = [i for i, far in enumerate(found.total.far) if far > MANY_FAR and i not in strangers]
    if not large:
        return []
    shares = ", ".join(f"{_percent(found.total.far[i])} of the elements of {_name(i + 1)}" for i in large)
    text = f"{shares} changed by more than {FAR}. {_DARE}"
    return [Finding("large deltas", [i + 1 for i in large], text)]


def _dtypes(found: Kinship) -> list[Finding]:
    own = " and ".join(found.dtypes[0])
    findings = []
    for i, dtypes in enumerate(found.dtypes[1:], 1):
        if set(dtypes) != set(found.dtypes[0]):
            text = (
                f"{_name(i)} is {' and '.join(dtypes)}, the base {own}: what rounding moved counts as its task vector"
            )
            findings.append(Finding("mixed dtypes", [i], text))
    return findings


def _name(index: int) -> str:
    return "the base" if index == 0 else f"model {index}"


def _list(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return _name(indices[0])
    return f"models {', '.join(map(str, indices[:-1]))} and {indices[-1]}"


def _percent(share: float) -> str:
    return f"{digits_text(100 * share)} %"
