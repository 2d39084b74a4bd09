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


def spacing(stored):
    """From every value to the next one of the narrowest dtype that holds them all; 0 of zeros."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        narrow = stored.to(dtype)
        if dtype == stored.dtype or torch.equal(narrow.to(stored.dtype), stored):
            break
    size = narrow.abs()
    return torch.where(size > 0, torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double(), 0.0)


def rounding(stored):
    """Twice the variance of uniform rounding, and the bound of Bandeira and van Handel for independent entries."""
    variance = 2 * spacing(stored) ** 2 / 12
    return variance.sum(1).max().sqrt() + variance.sum(0).max().sqrt()


def vectors(base, models, weight=1.0, cut=True):
    """Weighted task vectors, without the triplets that are not above rounding, unless none of any is.

    Where the energy of these triplets is more than 1.25 times that of rounding, and more than float32 resolves, they stay.
    The base counts as rounded, too, except in bfloat16.
    """
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    deltas = [model.double() - base.double() for model in models]
    above = []
    for model, delta in zip(models, deltas, strict=True):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        real = s > rounding(model)
        resolved = (2.0**-20 * delta.norm()) ** 2
        bfloat16 = torch.equal(model.bfloat16().to(model.dtype), model)
        energy = (1 if bfloat16 else 2) * (spacing(model) ** 2 / 12).sum()
        rounded = s[~real].square().sum() <= max(1.25 * energy, resolved)
        above.append(u[:, real] @ torch.diag(s[real]) @ vh[real] if rounded else delta)
    kept = above if cut and any(delta.any() for delta in above) else deltas
    return [w * delta for w, delta in zip(weight, kept, strict=True)]
