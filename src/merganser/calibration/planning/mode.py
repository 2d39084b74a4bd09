"""How statistics are measured: by a model alone, or together with the models that it is merged with."""

from __future__ import annotations

from dataclasses import dataclass

from ...method import DataInputs
from ..learning import Descent

__all__ = ["ALONE", "Mode"]


@dataclass(frozen=True, slots=True)
class Mode:
    """How statistics are measured.

    Args:
        inputs: What computes the inputs, as in `FromData`. If not the model itself, all models of the recipe are measured
            together.
        together: Number of the models that are measured together.
        descent: The steps in which coefficients are learnt; None if none are.
        steps: The number of steps in which coefficients are fitted, block by block.
        batch: The number of sequences of each model in such a step.
    """

    inputs: DataInputs = "own"
    together: int = 1
    descent: Descent | None = None
    steps: int = 0
    batch: int = 0


ALONE = Mode()
"""The model by itself."""
