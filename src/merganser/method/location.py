"""Where in a model a tensor is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Location:
    """Where in the output a tensor is, and what it does there.

    Args:
        position: In a layer, or the side of the layers on which the tensor is used: embeddings and towers beside the
            language model come before them, the final norm and the head after.
        layer: Number of its layer, from 0; None outside layers.
        n_layers: Number of layers in its stack; 0 outside layers.
        role: "embedding", "head", "norm", "attention", "mlp", "expert", "router", ..., or "other".
    """

    position: Literal["before", "layer", "after"] = "before"
    layer: int | None = None
    n_layers: int = 0
    role: str = "other"
