"""Deep et al. 2024, "DELLA-Merging", section 3.1 (MagPrune): drop with probability p_i, which falls with the rank, and divide the
survivors by 1 - p_i.

Written for the probability to be kept, as the authors' code has it: from density - epsilon for the smallest entry of a
row to density + epsilon for the largest, in equal steps.
"""

import numpy as np
import torch

from tests.reference.draws import draws


def keep_probabilities(delta, density, epsilon):
    """Row by row; of equal entries the first has the smaller rank."""
    rows = delta.reshape(delta.shape[0], -1) if delta.dim() > 1 else delta.reshape(1, -1)
    n = rows.shape[1]
    steps = [density - epsilon + 2 * epsilon * rank / (n - 1) for rank in range(n)] if n > 1 else [density]
    probabilities = np.empty(rows.shape)
    for row, target in zip(rows.abs().numpy(), probabilities, strict=True):
        target[np.argsort(row, kind="stable")] = steps
    return torch.from_numpy(probabilities).view(delta.shape)


def magprune(base, models, density, epsilon, rescale, rescale_to, seed, tensor):
    density = density or [1.0] * len(models)
    epsilon = epsilon or [0.15] * len(models)
    kept = []
    for i, (model, d, e) in enumerate(zip(models, density, epsilon, strict=True)):
        delta = model.double() - base
        p = keep_probabilities(delta, d, e) if 0 < d < 1 else torch.full_like(delta, d)
        survivors = delta * (torch.from_numpy(draws(seed, tensor, i, delta.numel())).view(delta.shape) < p)
        if rescale and rescale_to == "expectation":
            survivors = survivors / torch.where(p > 0, p, 1.0)
        if rescale and rescale_to == "l1":
            before, after = float(delta.abs().sum()), float(survivors.abs().sum())
            survivors = survivors * (before / after if min(before, after) >= 1e-7 else 1)
        kept.append(survivors)
    return kept


def della_linear(
    base,
    models,
    *,
    weight,
    density=None,
    epsilon=None,
    normalize=False,
    rescale=True,
    rescale_to="expectation",
    seed=0,
    tensor="tensor",
    **other,
):
    base = base.double()
    kept = magprune(base, models, density, epsilon, rescale, rescale_to, seed, tensor)
    total = sum(w * vector for w, vector in zip(weight, kept, strict=True))
    return base + other.get("lambda", 1.0) * total / (sum(weight) if normalize else 1)
