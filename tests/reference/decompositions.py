"""What the papers on spectral merging take from linear algebra, in float64."""

import torch

RANK = 2.0**-22


def triplets(matrix, k=None, tolerance=0.0):
    """The leading singular triplets, without those that are zero to rounding of float32."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    r = int((s > max(tolerance, RANK) * s[:1]).sum())
    r = r if k is None else min(r, k)
    return u[:, :r], s[:r], vh[:r].T


def nearest_orthonormal(*frames):
    """The orthonormal columns nearest to frames side by side; what they share to 1e-5 stays undetermined."""
    u, _, v = triplets(torch.cat(frames, dim=1), tolerance=1e-5)
    return u @ v.T


def vectors(base, models, weight=1.0):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    return [w * (model.double() - base.double()) for w, model in zip(weight, models, strict=True)]
