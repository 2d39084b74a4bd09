"""A reconstruction of R-TSVM (Yang et al. 2025, "Mix Data or Merge Models?", abstract): outliers weigh, sparsity ranks."""

from tests.reference.decompositions import vectors
from tests.reference.tsv_m import merge_truncated


def portions(amounts):
    return [a / sum(amounts) if sum(amounts) > 0 else 1 / len(amounts) for a in amounts]


def r_tsvm(base, models, *, weight=1.0, sigmas=3.0, epsilon=0.0, **other):
    n, r = len(models), min(base.shape)
    weight = weight if isinstance(weight, list) else [weight] * n
    deltas = vectors(base, models)
    outliers, active = [], []
    for delta, raw in zip(deltas, vectors(base, models, cut=False), strict=True):
        size = delta.abs()
        deviation = ((size - size.mean()) ** 2).mean() ** 0.5
        outliers.append(float(size[size > size.mean() + sigmas * deviation].sum()))
        active.append(float((raw.abs() > epsilon).double().mean()))
    ranks = [max(int(r * share + 1e-9), 1) for share in portions(active)]
    scales = [w * n * share for w, share in zip(weight, portions(outliers), strict=True)]
    return base.double() + other.get("lambda", 1.0) * merge_truncated(deltas, ranks, scales)
