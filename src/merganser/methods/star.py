"""STAR: task vectors without their weakest singular directions, rescaled to their original nuclear norm."""

import torch
from torch import Tensor

from ..method import Embeddings, Fraction, Others, PerModel, Scale, Weight, default, merge_method
from ..ops.linalg.rounding import triplets_above_rounding
from ..ops.linalg.spectral import Svd, svd
from ..ops.sum import check_total

_ROUNDING = 1e-6


def truncated(delta: Svd, eta: float) -> Tensor:
    """Return the leading triplets of a matrix that make up a share of its nuclear norm, scaled up to all of it.

    Args:
        delta: All triplets of the matrix.
        eta: The share.
    """
    left, values, right = delta
    if not len(values):
        return left @ right.T
    sums = values.cumsum(0)
    k = int((sums < eta * (1 - _ROUNDING) * sums[-1]).sum()) + 1
    kept = values[:k] * (sums[-1] / sums[k - 1])
    return left[:, :k] * kept.to(left.dtype) @ right[:, :k].T


@merge_method(
    family="spectral",
    cite="lee2025star",
    scope="matrix",
    version=3,
    breaks={"identical": "weak directions are left out"},
    validate=check_total,
)
def star(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    eta: Fraction = default(0.4),
    normalize: bool = True,
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Truncate the spectrum of every task vector, restore its nuclear norm, and average.

        delta_i = U diag(s) V^T,   k = the smallest with s_1 + ... + s_k >= eta * sum(s),   delta_i = model_i - base
        kept_i  = sum(s) / (s_1 + ... + s_k) * (the k leading triplets of delta_i)
        merged  = base + lambda * sum_i weight_i * kept_i / sum_i weight_i

    Use when:
        Many fine-tunes are merged, and the weak directions of each are noise to the others.

    Args:
        weight: Share of each model.
        lambda_: Factor of the merged task vector.
        eta: Share of the nuclear norm that is kept; the paper says 40 percent.
        normalize: Divide by the sum of the weights.

    Differs from the paper:
        The paper merges products of LoRA factors; here any matrix is truncated.
        Singular values that contain only rounding errors of the stored weights are not part of the nuclear norm.
        The sums are compared to 1e-6, so that equal singular values do not make k a matter of rounding.
        The paper has no weights; equal ones give its formula.
        Embeddings and head are averaged unless `embeddings: matrix` says otherwise.
    """
    parts = triplets_above_rounding(base, models, rounding, svd)
    total = torch.zeros_like(base)
    for part, share in zip(parts, weight, strict=True):
        total = total + truncated(part, float(eta)) * share
    return base + total * (lambda_ / weight.sum() if normalize else lambda_)
