"""RobustMerge (CoPA) on the factors of adapters, as its authors apply it."""

import torch

from ..errors import ParameterError
from ..method import Fraction, PerModel, Scale, Weight, default
from ..method.declare import factor_method
from ..method.factors import Factors
from ..methods.robust_merge import pruned, scales
from ..ops import weighted_sum


@factor_method(cite="zeng2025robustmerge")
def robust_merge(
    models: list[Factors],
    *,
    weight: PerModel[Weight] = default(2.0),
    lambda_: Scale = default(1.0),
    density: Fraction = default(0.2),
    scale_quantile: Fraction = default(0.8),
) -> Factors:
    """Prune the factors of adapters, rescale them, and merge those of one side, then those of the other.

        A'_i, B'_i = the largest entries of A_i, and of B_i
        s_ij   = |row j of A_i|_1 / |row j of A'_i|_1, and at least the scale_quantile of these over j
        A      = sum_i weight_i * A'_i
        B      = sum_i weight_i * scale_i * B'_i diag(s_i) / sum_i s_i
        merged = lambda * B A

    Use when:
        Adapters of equal rank are merged, as for multimodal instruction tuning in the paper.

    Args:
        weight: Factor of each adapter, in both sides, so that it counts twice in the product.
        lambda_: Factor of the merged change.
        density: Share of the entries of every factor that is kept.
        scale_quantile: Scales are raised to this quantile of the adapter's scales.

    Differs from the paper:
        A rank that pruning empties has the scale 0 before it is raised; published code divides by zero.
    """
    ranks = {model.rank for model in models}
    if len(ranks) > 1:
        raise ParameterError(f"robust_merge needs adapters of one rank, got {sorted(ranks)}")
    kept = [pruned(model.a, density) for model in models]
    scale = [scales(model.a.T, own.T, scale_quantile).to(own.dtype) for model, own in zip(models, kept, strict=True)]
    outer = [pruned(model.b, density) * own * model.scale for model, own in zip(models, scale, strict=True)]
    total = weighted_sum(scale, torch.ones_like(weight))
    total = torch.where(total > 0, total, 1.0)
    return Factors(weighted_sum(kept, weight), weighted_sum(outer, weight) / total * lambda_.to(total.dtype))
