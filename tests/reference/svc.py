"""Li et al. 2026, "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", algorithm 1, eq. 4 to 9."""

import torch

from tests.reference.decompositions import triplets, vectors


def svc(base, models, *, weight=1.0, alpha=0.1, rank_tolerance=0.0, **other):
    merged = other.get("lambda", 0.3) * sum(vectors(base, models, weight, cut=rank_tolerance == 0))
    tasks = vectors(base, models, cut=rank_tolerance == 0)
    u, s, v = triplets(merged, tolerance=rank_tolerance)
    calibrated = torch.zeros_like(merged)
    for r in range(len(s)):
        response = u[:, r] @ merged
        coefficients = []
        for task in tasks:
            own = u[:, r] @ task
            nothing = own.norm() <= 1e-3 * s[r]
            coefficient = 0.0 if nothing else float(torch.dot(response, own) / torch.dot(own, own))
            coefficients.append(max(coefficient, alpha))
        gamma = len(tasks) / sum(coefficients) if sum(coefficients) > 0 else 1.0
        calibrated += gamma * s[r] * torch.outer(u[:, r], v[:, r])
    return base.double() + calibrated
