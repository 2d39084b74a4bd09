"""Davari and Belilovsky 2024, "Model Breadcrumbs", section 3.2: mask the top gamma and the bottom beta of each layer.

As in the authors' code: first the largest floor(gamma n) entries are removed, then the largest floor((1 - beta) n) of the
rest are kept; density is 1 - beta.
"""

import math

import torch


def mask_middle(vector, density, gamma, precedence):
    """Mask one layer (or one row) by magnitude; entries as large as the first or the last kept one are kept."""
    n = vector.numel()
    kept, removed = math.floor(density * n), math.floor(gamma * n)
    if precedence == "density":
        removed = min(removed, n - kept)
    middle = vector.abs().reshape(-1).sort(descending=True).values[removed : removed + kept]
    if not len(middle):
        return torch.zeros_like(vector)
    return vector * ((vector.abs() <= middle[0]) & (vector.abs() >= middle[-1]))


def crumbs(base, models, density, gamma, precedence, by, rescale):
    density = density or [1.0] * len(models)
    gamma = gamma or [0.01] * len(models)
    found = []
    for model, d, g in zip(models, density, gamma, strict=True):
        delta = model.double() - base
        if by == "row":
            rows = delta.reshape(delta.shape[0], -1)
            kept = torch.stack([mask_middle(row, d, g, precedence) for row in rows]).view(delta.shape)
        else:
            kept = mask_middle(delta, d, g, precedence)
        if rescale:
            before, after = float(delta.abs().sum()), float(kept.abs().sum())
            kept = kept * (before / after if min(before, after) >= 1e-7 else 1)
        found.append(kept)
    return found


def breadcrumbs(
    base,
    models,
    *,
    weight,
    density=None,
    gamma=None,
    normalize=False,
    rescale=False,
    precedence="gamma",
    by="tensor",
    **other,
):
    base = base.double()
    kept = crumbs(base, models, density, gamma, precedence, by, rescale)
    total = sum(w * vector for w, vector in zip(weight, kept, strict=True))
    return base + other.get("lambda", 1.0) * total / (sum(weight) if normalize else 1)
