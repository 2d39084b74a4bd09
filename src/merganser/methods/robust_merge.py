"""RobustMerge (CoPA): prune and rescale low-rank factors, and merge those of one side, then those of the other."""

import torch
from torch import Tensor

from ..method import Count, Embeddings, Fraction, Others, PerModel, Scale, Weight, default, merge_method
from ..ops import leading, weighted_sum
from ..ops.linalg.rounding import triplets_above_rounding
from ..ops.linalg.spectral import Svd


def padded(part: Svd, n: int) -> tuple[Tensor, Tensor]:
    """Return factors whose product is a matrix, with n columns, zero where there are fewer triplets than that."""
    left, values, right = part.left[:, :n], part.values[:n], part.right[:, :n]
    root, missing = values.sqrt().to(left.dtype), (0, n - len(values))
    return torch.nn.functional.pad(left * root, missing), torch.nn.functional.pad(right * root, missing)


def pruned(factor: Tensor, density: Tensor) -> Tensor:
    """Keep the entries of a factor that are as large as the k-th smallest, k = floor((1 - density) * size)."""
    k = int(factor.numel() * (1 - float(density)))
    if k == 0:
        return factor
    magnitude = factor.abs()
    return torch.where(magnitude >= magnitude.reshape(-1).kthvalue(k).values, factor, 0.0)


def scales(factor: Tensor, kept: Tensor, quantile: Tensor) -> Tensor:
    """Return for each column its L1 norm before over after pruning, at least a quantile of these; shape [R], float64.

    Args:
        factor: Shape [n, R].
        kept: The factor after pruning.
        quantile: The ratios are raised to at least this quantile of all.
    """
    before, after = (part.double().abs().sum(0) for part in (factor, kept))
    ratios = torch.where(after > 0, before / torch.where(after > 0, after, 1.0), 0.0)
    place = min(int(len(ratios) * float(quantile)), len(ratios) - 1)
    return ratios.clamp(min=ratios.sort().values[place])


@merge_method(
    family="spectral",
    cite="zeng2025robustmerge",
    scope="matrix",
    version=3,
    breaks={"identical": "factors are pruned and scaled"},
)
def robust_merge(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    rank: Count = 128,
    density: Fraction = default(0.2),
    scale_quantile: Fraction = default(0.8),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Prune and rescale low-rank factors of the task vectors, and merge each side: RobustMerge for whole models.

        delta_i ~ B_i A_i,   of rank R,   delta_i = model_i - base
        A'_i, B'_i = the largest entries of A_i, and of B_i
        s_ij   = |row j of A_i|_1 / |row j of A'_i|_1, and at least the scale_quantile of these over j
        A      = sum_i weight_i * A'_i
        B      = sum_i weight_i * B'_i diag(s_i) / sum_i s_i
        merged = base + lambda * B A

    Use when:
        LoRA fine-tunes of equal rank are merged, as for multimodal instruction tuning in the paper.

    Args:
        weight: Factor of each model, in both sides, so that it counts twice in the product. The authors take 2 for trained
            factors, of which pruning keeps less (see below); here 2 is too much.
        lambda_: Factor of the merged task vector.
        rank: Largest number of singular triplets that are kept of each task vector; fewer if its rank is lower.
        density: Share of the entries of every factor that is kept.
        scale_quantile: Scales are raised to this quantile of the model's scales.

    Differs from the paper:
        The paper merges LoRA factors as they were trained. Here they are recovered from the task vector by its
        singular value decomposition, with the singular values shared evenly between both sides and the largest entry
        of each left vector positive. Factors are not unique, pruning depends on which they are, and so does the
        result: at the default density those of the decomposition keep about 75 % of their squared norm, those of four
        adapters as they were trained 60 %.
        Singular values that contain only rounding errors of the stored weights are not part of the rank.
        The merged product mixes the factors of different models (B_i A_j), as the paper's does.
        A rank that pruning empties has the scale 0 before it is raised; published code divides by zero.
    """
    most = min(rank, *base.shape)
    parts = triplets_above_rounding(base, models, rounding, lambda delta: leading(delta, most))
    common = max(int((part.values > 0).sum()) for part in parts)
    if common == 0:
        return base.clone()
    left, right, scale = [], [], []
    for part in parts:
        outer, inner = padded(part, common)
        kept = pruned(inner, density)
        scale.append(scales(inner, kept, scale_quantile).to(base.dtype))
        left.append(pruned(outer, density) * scale[-1])
        right.append(kept)
    total = weighted_sum(scale, torch.ones_like(weight))
    total = torch.where(total > 0, total, 1.0)
    return base + (weighted_sum(left, weight) / total) @ weighted_sum(right, weight).T * lambda_
