"""What a plan says of a stacked model whose seams were healed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HealingSummary"]


@dataclass(frozen=True, eq=False)
class HealingSummary:
    """A healed model, for the run record and the model card.

    Args:
        recipe: The recipe of the stacked model.
        tensors: For each tensor that was fitted: its name, error before and after, on held-out text, and the ridge.
        perplexity: Perplexity of the stacked model on the held-out text.
        healed: That of the healed one.
        data: The text.
        digest: Hash of the fitted tensors.
    """

    recipe: str
    tensors: Sequence[Mapping[str, Any]]
    perplexity: float
    healed: float
    data: Mapping[str, Any]
    digest: str

    def sentence(self, tool: str) -> str:
        """Return the model card's sentence on how the model was made, by `tool`; everything else is copied."""
        return (
            f"The stacked model below, in which {tool} fitted {len(self.tensors)} matrices at seams and after them, so that\n"
            "what layers receive is closer to what they received in the models that they came from; everything else is\n"
            f"copied. Perplexity on text that the fit did not see: {self.perplexity:.2f} before, {self.healed:.2f} after."
        )

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the run record."""
        return {
            "recipe": self.recipe,
            "tensors": [dict(own) for own in self.tensors],
            "perplexity_before": self.perplexity,
            "perplexity_after": self.healed,
            "data": dict(self.data),
            "tensors_hash": self.digest,
        }
