"""R-TSVM: TSV-M with weights from outliers and ranks from sparsity. A reconstruction."""

import torch
from torch import Tensor

from ..method import Embeddings, NonNegative, Others, PerModel, Scale, Weight, default, merge_method
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import joined, svd
from ..ops.shares import shares


def outlier_mass(delta: Tensor, sigmas: Tensor) -> Tensor:
    """Return the sum of the magnitudes that exceed their mean by more than `sigmas` standard deviations, 0-d."""
    magnitude = delta.double().abs()
    cut = magnitude.mean() + sigmas * magnitude.std(correction=0)
    return torch.where(magnitude > cut, magnitude, 0.0).sum()


@merge_method(
    family="spectral",
    cite="yang2025mix",
    scope="matrix",
    version=3,
    breaks={"identical": "only a share of the singular vectors of each model is kept"},
)
def r_tsvm(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    sigmas: NonNegative = default(3.0),
    epsilon: NonNegative = default(0.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Merge as TSV-M does, with a weight for every model from its outliers and a rank from its sparsity.

        O_i  = sum of |delta_i| where |delta_i| > mean |delta_i| + sigmas * std |delta_i|,   delta_i = model_i - base
        w_i  = T * O_i / sum_j O_j
        k_i  = floor(min(rows, columns) * a_i / sum_j a_j),   a_i = share of the entries with |delta_i| > epsilon
        merged = base + lambda * U S V^T as in TSV-M, of the k_i leading triplets of delta_i, their singular values
                 times weight_i * w_i

    Use when:
        Task vectors differ in how concentrated they are, and TSV-M gives the diffuse ones too many directions.

    Args:
        weight: Factor of each task vector, in addition to w_i.
        lambda_: Factor of the merged task vector.
        sigmas: Standard deviations above the mean from which an entry is an outlier.
        epsilon: Largest change of an entry that counts as none.

    Differs from the paper:
        Only the abstract could be read, under the names R-TSVM and RESM. It says that weights follow outliers and
        ranks follow sparsity; thresholds, normalisation and the order of the steps are ours.
        Directions that contain only rounding errors of the stored weights are left out.
        What is said of degenerate inputs under TSV-M holds here, too.
    """
    size, vectors = min(base.shape), deltas_above_rounding(base, models, rounding)
    outliers = shares(torch.stack([outlier_mass(delta, sigmas) for delta in vectors])) * len(models)
    # counted in the changes as they are stored: where rounding is left out, no entry is 0
    active = shares(torch.stack([((model - base).abs() > epsilon).double().mean() for model in models]))
    parts = []
    for i, delta in enumerate(vectors):
        # the added 1e-9: a product that should be a whole number may be slightly below it
        part = svd(delta, max(int(size * float(active[i]) + 1e-9), 1))
        parts.append(part._replace(values=part.values * (weight[i] * outliers[i])))
    return base + joined(parts) * lambda_
