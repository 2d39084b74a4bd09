"""Wei et al. 2025, "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent", as FusionBench has it."""

import torch

from tests.reference.decompositions import vectors


def directions(deltas, subspace):
    r = min(deltas[0].shape)
    k = r // len(deltas)
    kept = []
    for delta in deltas:
        u, s, _ = torch.linalg.svd(delta, full_matrices=False)
        kept.append(u[:, : min(k, int((s > 1e-5 * s[0]).sum()))])
    u, s, _ = torch.linalg.svd(torch.cat(kept, dim=1), full_matrices=False)
    return u[:, : min(r // subspace, int((s > 1e-5).sum()))]


def loss(deltas, lambdas, change):
    merged = sum(lam * (delta + change) for lam, delta in zip(lambdas, deltas, strict=True))
    return sum((delta * (delta - merged)).sum(dim=1).square().sum() for delta in deltas)


def doge(base, models, *, eta=0.07, density=0.3, solver="adam", steps=400, learning_rate=1e-4, subspace=6):
    deltas = vectors(base, models)
    base = base.double()
    lambdas = [eta / delta.norm() for delta in deltas]
    change = torch.nn.Parameter(torch.zeros_like(base))
    if solver == "rows":
        # row by row: least squares of least norm
        found = torch.zeros_like(base)
        total = sum(lambdas)
        merged = sum(lam * delta for lam, delta in zip(lambdas, deltas, strict=True))
        for r in range(base.shape[0]):
            a = torch.stack([delta[r] for delta in deltas]) * total
            b = torch.stack([delta[r] @ (delta[r] - merged[r]) for delta in deltas])
            found[r] = torch.linalg.pinv(a, rtol=1e-5) @ b
        change = found
    else:
        optimiser = torch.optim.Adam([change], lr=learning_rate)
        u = directions(deltas, subspace)
        for _ in range(steps):
            optimiser.zero_grad()
            loss(deltas, lambdas, change).backward()
            change.grad -= u @ u.T @ change.grad
            optimiser.step()
        change = change.detach()
    merged = base.clone()
    for lam, delta in zip(lambdas, deltas, strict=True):
        k = int(density * delta.numel())
        cut = delta.abs().flatten().sort(descending=True).values[k - 1] if k else torch.inf
        merged += lam * (delta + change) * (delta.abs() >= cut)
    return merged
