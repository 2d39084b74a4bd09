"""SWUDI: WUDI by a spectral filter, only in the strongest directions."""

import math

import torch
from torch import Tensor

from ..method import Embeddings, Fraction, NonNegative, Others, Scale, default, merge_method
from ..ops.linalg.interference import Interference, Start, exponential, inverse_squares, starting_point, strongest
from ..ops.linalg.rounding import deltas_above_rounding


@merge_method(family="spectral", cite="wei2026spectral", scope="matrix", version=3)
def swudi(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    lambda_: Scale = default(1.0),
    time: NonNegative = default(1300.0),
    rank: Fraction = default(0.65),
    start: Start = "sum",
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Move the sum of the task vectors towards the least interference, in directions where they are strong.

        C      = sum_i delta_i^T delta_i / |delta_i|^2 = V diag(c) V^T,    delta_i = model_i - base
        f(c_k) = 1 - exp(-c_k * time) for the ceil(rank * columns) largest c_k, else 0
        M      = M_0 + (M_min - M_0) V diag(f) V^T,    M_0 = sum_i delta_i, M_min the minimum of WUDI
        merged = base + lambda * M

    In directions where the task vectors are weak, their sum is not changed.

    Use when:
        WUDI would be used; its group found this form of it best on CLIP. For full fine-tunes of language models they
        recommend time 300 and rank 0.85.

    Args:
        lambda_: Factor of the merged task vector.
        time: How far the filter goes: 0 stays at M_0.
        rank: Share of the directions that the filter changes, the strongest.
        start: M_0: the sum of the task vectors, their mean (which keeps their size), or zero.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        Directions in which c is below 1e-8 are not changed; the authors raise c to that.
    """
    vectors = deltas_above_rounding(base, models, rounding)
    interference = Interference(vectors, vectors, inverse_squares(vectors), starting_point(vectors, start))
    kept = math.ceil(float(rank) * base.shape[1] - 1e-9)

    def gain(values: Tensor) -> Tensor:
        return torch.where(strongest(values, kept), exponential(values, time), 0.0)

    return base + lambda_ * interference.filtered(gain).to(base.dtype)
