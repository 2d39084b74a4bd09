"""What a plan says of a mixture of experts that is built from dense models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MixtureSummary"]


@dataclass(frozen=True, eq=False)
class MixtureSummary:
    """A mixture of experts, for the run record and the model card.

    Args:
        architecture: Name of the model's class in transformers.
        experts: The models whose MLPs are its experts, in their order.
        experts_per_token: How many of them compute each token.
        gate_mode: How the routers were made.
        router: What is known of the routers, as plain data.
        digest: Hash of the routers' values.
    """

    architecture: str
    experts: tuple[str, ...]
    experts_per_token: int
    gate_mode: str
    router: Mapping[str, Any]
    digest: str

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
