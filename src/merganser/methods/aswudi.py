"""ASWUDI: the minimum of WUDI in a number of directions that follows from the spectrum."""

import math

import torch
from torch import Tensor

from ..method import Embeddings, Others, Scale, default, merge_method
from ..ops.linalg.interference import Interference, Start, inverse, inverse_squares, starting_point, strongest
from ..ops.linalg.rounding import deltas_above_rounding


def participation(values: Tensor) -> int:
    """Return the participation number of the spectrum, (sum of sqrt(c))^2 / (sum of c), rounded up."""
    total = float(values.sum())
    return math.ceil(float(values.sqrt().sum()) ** 2 / total * (1 - 1e-9)) if total > 0 else 0


@merge_method(
    family="spectral",
    cite="wei2026spectral",
    scope="matrix",
    version=3,
    breaks={"identical": "in weak directions the sum of the models' task vectors is kept"},
)
def aswudi(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    lambda_: Scale = default(1.0),
    start: Start = "sum",
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Move the sum of the task vectors to the least interference, in a number of directions given by the spectrum.

        C      = sum_i delta_i^T delta_i / |delta_i|^2 = V diag(c) V^T,    delta_i = model_i - base
        K      = ceil((sum_k sqrt(c_k))^2 / sum_k c_k)
        M      = M_0 + (M_min - M_0) V_K V_K^T,    M_0 = sum_i delta_i, M_min the minimum of WUDI
        merged = base + lambda * M

    Use when:
        SWUDI would be used, but without parameters to choose.

    Args:
        lambda_: Factor of the merged task vector.
        start: M_0: the sum of the task vectors, their mean (which keeps their size), or zero.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        Eigenvalues are not raised to 1e-8, so that directions of zero do not count in K; those below it are not
        changed. The authors' code has other rules for K, too.
    """
    vectors = deltas_above_rounding(base, models, rounding)
    interference = Interference(vectors, vectors, inverse_squares(vectors), starting_point(vectors, start))

    def gain(values: Tensor) -> Tensor:
        return torch.where(strongest(values, participation(values)), inverse(values), 0.0)

    return base + lambda_ * interference.filtered(gain).to(base.dtype)
