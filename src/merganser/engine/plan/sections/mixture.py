"""What a plan says of a mixture of experts: one that is built from dense models, or made smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MixtureSummary", "ShrinkingSummary"]


@dataclass(frozen=True, eq=False)
class MixtureSummary:
    """A mixture of experts, for the run record and the model card.

    Args:
        architecture: Name of the model's class in transformers.
        experts: The models whose MLPs are its experts, in their order.
        experts_per_token: How many of them compute each token.
        gate_mode: How the routers were made; "joined" if all of them come from the models.
        router: What is known of the routers, as plain data.
        digest: Hash of the routers' values.
    """

    architecture: str
    experts: tuple[str, ...]
    experts_per_token: int
    gate_mode: str
    router: Mapping[str, Any]
    digest: str

    def sentence(self, tool: str, method: str) -> str:
        """Return the model card's sentence on how the model was made, by `tool`, with the shared parts by `method`."""
        if self.gate_mode == "joined":
            return (
                f"A mixture of {len(self.experts)} experts, {self.experts_per_token} per token, joined with {tool} from the experts\n"
                "of the mixtures below, which share everything else."
            )
        return (
            f"A mixture of {len(self.experts)} experts, {self.experts_per_token} per token, built with {tool} from the MLPs of\n"
            f"the models below; the shared parts by `{method}`, the routers by `{self.gate_mode}`."
        )

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the run record."""
        return {
            "architecture": self.architecture,
            "experts": list(self.experts),
            "experts_per_token": self.experts_per_token,
            "gate_mode": self.gate_mode,
            "router": dict(self.router),
            "routers_hash": self.digest,
        }


@dataclass(frozen=True, eq=False)
class ShrinkingSummary:
    """A mixture of experts that was made smaller, for the run record and the model card.

    Args:
        method: Name of the method for shrinking.
        experts: Number of experts in each layer.
        experts_before: Number of those of the model.
        experts_per_token: How many experts compute each token.
        groups: For each layer, the experts of the model that each new one is made of.
        data: The text on which the experts were observed.
        digest: Hash of the new tensors.
    """

    method: str
    experts: int
    experts_before: int
    experts_per_token: int
    groups: Mapping[str, Sequence[Sequence[int]]]
    data: Mapping[str, Any]
    digest: str

    def sentence(self, tool: str, method: str) -> str:
        """Return the model card's sentence on how the model was made, by `tool`; everything else is copied."""
        return (
            f"The model below with {self.experts} experts per layer in place of {self.experts_before}, "
            f"{self.experts_per_token} per token, made with {tool} by\n`{self.method}`; everything else is copied."
        )

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the run record."""
        return {
            "shrunk_by": self.method,
            "experts": self.experts,
            "experts_before": self.experts_before,
            "experts_per_token": self.experts_per_token,
            "groups": {name: [list(own) for own in each] for name, each in self.groups.items()},
            "data": dict(self.data),
            "experts_hash": self.digest,
        }
