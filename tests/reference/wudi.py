"""Cheng et al. 2025, "Whoever Started the Interference Should End It": the loss, and Adam on it; and the filters on the
way to its minimum of Wei et al. 2026, "Closed-Form Spectral Regularization for Multi-Task Model Merging"."""

import torch

from tests.reference.decompositions import vectors


def first(deltas, start):
    total = sum(deltas)
    return {"sum": total, "mean": total / len(deltas), "zero": torch.zeros_like(total)}[start]


def quadratic(targets, sources, norms):
    """C and D of the gradient 2 (M C - D); a task without a task vector has no say."""
    n = targets[0].shape[1]
    c, d = torch.zeros(n, n, dtype=torch.float64), torch.zeros_like(targets[0])
    for target, source, norm in zip(targets, sources, norms, strict=True):
        if norm > 0:
            c += source.T @ source / norm**2
            d += target @ source.T @ source / norm**2
    return c, d


def walk(c, d, m0, share):
    """M_0 + (D C^+ - M_0) V diag(share) V^T, where directions in which C is below 1e-8 are not walked in."""
    values, v = torch.linalg.eigh((c + c.T) / 2)
    known = values > 1e-8
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    minimum = d @ v @ torch.diag(inverse) @ v.T
    f = torch.where(known, share(values), 0.0)
    return m0 + (minimum - m0) @ v @ torch.diag(f) @ v.T


def descend(targets, sources, norms, m0, steps, learning_rate):
    """Adam on the loss as it is printed."""
    merged = torch.nn.Parameter(m0.clone())
    optimiser = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        loss = sum(
            ((merged - target) @ source.T).square().sum() / norm**2
            for target, source, norm in zip(targets, sources, norms, strict=True)
            if norm > 0
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return merged.detach()


def solve(targets, sources, norms, m0, solver, time, steps, learning_rate):
    if solver == "adam":
        return descend(targets, sources, norms, m0, steps, learning_rate)
    c, d = quadratic(targets, sources, norms)
    if solver == "minimum":
        return walk(c, d, m0, torch.ones_like)
    return walk(c, d, m0, lambda values: 1 - torch.exp(-values * time))


def wudi(base, models, *, solver="filter", time=300.0, steps=300, learning_rate=1e-5, start="sum", **scale):
    deltas = vectors(base, models)
    norms = [delta.norm() for delta in deltas]
    merged = solve(deltas, deltas, norms, first(deltas, start), solver, time, steps, learning_rate)
    return base.double() + scale.get("lambda", 1.0) * merged
