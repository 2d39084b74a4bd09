"""Position of a tensor in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Location:
    """Position and role of a tensor in the output model.

    Args:
        position: "layer" for a tensor of a layer; otherwise the side of the layers on which it is used: "before" for
            embeddings and encoders of other modalities, "after" for the final norm and the head.
        layer: Number of its layer, from 0; None outside layers.
        n_layers: Number of layers in its stack; 0 outside layers.
        role: "embedding", "head", "norm", "attention", "mlp", "expert", "router", ..., or "other".
    """

    position: Literal["before", "layer", "after"] = "before"
    layer: int | None = None
    n_layers: int = 0
    role: str = "other"
