"""How models are permuted to a reference before they are merged, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Permutation", "PermutedModel"]


@dataclass(frozen=True, slots=True)
class PermutedModel:
    """What is permuted in one model.

    Args:
        model: Its name in the recipe.
        moved: Units that change their place and all units, by kind; empty if that is not known before an earlier stage
            has run.
        digest: Hash of the permutation.
        measured: What activations were compared on: both models, and the data, with their hashes; None by weights.
    """

    model: str
    moved: Mapping[str, tuple[int, int]]
    digest: str
    measured: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Permutation:
    """The permutations of a merge.

    Args:
        to: The model that keeps its order.
        by: What was compared.
        models: The other models.
    """

    to: str
    by: str
    models: tuple[PermutedModel, ...]

    @property
    def digest(self) -> str:
        """A hash that distinguishes it from other permutations of the same models."""
        return " ".join(each.digest for each in self.models)

    def as_json(self) -> dict[str, Any]:
        """Return it for the run record."""
        return {
            "to": self.to,
            "by": self.by,
            "models": [
                {
                    "model": each.model,
                    "moved": {kind: {"units": count, "of": total} for kind, (count, total) in each.moved.items()},
                    "hash": each.digest,
                    **({} if each.measured is None else {"measured": dict(each.measured)}),
                }
                for each in self.models
            ],
        }
