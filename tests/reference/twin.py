"""Lu et al. 2024, "Twin-Merging", section 3.2: theta_s = theta_0 + lambda sum_t delta_t, v_t = SVD_r(theta_t - theta_s)."""

import math

import torch


def twin(base, models, *, weight=None, rank=0.1, others="own", embeddings="others", **other):
    base = base.double()
    weight = weight or [1.0] * len(models)
    total = sum(w * (model.double() - base) for w, model in zip(weight, models, strict=True))
    return base + other.get("lambda", 0.3) * total


def twin_restored(models, merged, rank=0.1):
    found = []
    for model in models:
        left, values, right = torch.linalg.svd(model - merged, full_matrices=False)
        k = math.floor(rank * min(model.shape))
        found.append(merged + left[:, :k] @ torch.diag(values[:k]) @ right[:k])
    return found
