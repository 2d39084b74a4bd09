"""What becomes of every tensor of the inputs: it is merged, copied, or left out for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ....wording import plural

__all__ = ["InputCensus", "census_entry", "census_text"]

_MOST_REASONS = 3


@dataclass(frozen=True, slots=True)
class InputCensus:
    """The tensors of one input.

    Args:
        merged: Number of those that a method computes tensors of the output from.
        copied: Number of those that the output holds unchanged, up to their dtype.
        left_out: The reason for each of the others, by name.
    """

    merged: int
    copied: int
    left_out: Mapping[str, str]

    @property
    def tensors(self) -> int:
        """The number of all tensors of the input."""
        return self.merged + self.copied + len(self.left_out)


def census_entry(model: str, found: InputCensus) -> dict[str, Any]:
    """Return the entry of the run record: numbers, and the names that were left out by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in found.left_out.items():
        names.setdefault(reason, []).append(name)
    return {
        "model": model,
        "tensors": found.tensors,
        "merged": found.merged,
        "copied": found.copied,
        "left_out": [{"reason": reason, "tensors": each} for reason, each in names.items()],
    }


def census_text(found: Iterable[InputCensus]) -> str:
    """Return a line that counts the tensors of all inputs together."""
    each = list(found)
    merged, copied = sum(one.merged for one in each), sum(one.copied for one in each)
    reasons = Counter(reason for one in each for reason in one.left_out.values())
    parts = [f"{merged:,} merged"] + ([f"{copied:,} copied"] if copied else [])
    if reasons:
        told = [f"{count:,}: {reason}" for reason, count in reasons.most_common(_MOST_REASONS)]
        told += ["..."] if len(reasons) > _MOST_REASONS else []
        parts.append(f"{reasons.total():,} left out ({'; '.join(told)})")
    return f"{plural(merged + copied + reasons.total(), 'tensor')} of the inputs: {', '.join(parts)}"
