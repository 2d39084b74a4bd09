"""Du et al. 2024, "Parameter Competition Balancing for Model Merging", equations 2 to 6, and the authors' code.

beta_intra,i = Softmax(N Norm(tau_i * tau_i)), beta_inter,i = sum_j Softmax(Norm(tau_i * tau_j)), beta_i = their product,
kept where it is among the r D largest; tau_m = sum_i beta_i tau_i / sum_i beta_i.
"""

import math

import torch


def norm(x):
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else torch.zeros_like(x)


def paper_scales(tau, density):
    n, d = tau.shape
    scales = []
    for i in range(n):
        intra = torch.softmax(n * norm(tau[i] * tau[i]), dim=0)
        inter = sum(torch.softmax(norm(tau[i] * tau[j]), dim=0) for j in range(n))
        beta = intra * inter
        if density[i] == 0:
            scales.append(torch.zeros_like(beta))
            continue
        kept = max(math.floor(density[i] * d), 1)
        scales.append(beta * (beta >= beta.sort(descending=True).values[kept - 1] * (1 - 1e-10)))
    return torch.stack(scales), tau


def limit(x, low, high):
    ordered = x.sort().values
    return x.clamp(ordered[int(len(x) * low)], ordered[int(len(x) * (1 - high) - 1)])


def code_scales(tau, density, clip):
    n = len(tau)
    scales, vectors = [], []
    for i in range(n):
        size = limit(tau[i].abs(), clip, clip)
        balance = torch.exp(n * norm(size) ** 2) * torch.tanh(tau[i] * tau.sum(dim=0))
        scales.append(norm(limit(balance, 1 - density[i], 0)) if density[i] else torch.zeros_like(balance))
        vectors.append(torch.sign(tau[i]) * size)
    return torch.stack(scales), torch.stack(vectors)


def merge_flat(tau, weight, density, form, clip):
    """The merged task vector from task vectors of shape [T, D]."""
    if form == "paper":
        scales, vectors = paper_scales(tau, density)
        total = scales.sum(dim=0)
        total = torch.where(total > 0, total, 1.0)
    else:
        scales, vectors = code_scales(tau, density, clip)
        total = scales.sum(dim=0).clamp(min=1e-12)
    factors = torch.tensor(weight, dtype=torch.float64).unsqueeze(1)
    return (scales * factors * vectors).sum(dim=0) / total


def pcb(base, models, *, weight=1.0, lambda_=1.0, density=0.1, form="paper", clip=1e-4, balance_over="model"):
    n = len(models)
    weight, density = (list(x) if isinstance(x, list) else [x] * n for x in (weight, density))
    start = base.double()
    tau = torch.stack([(model.double() - start).flatten() for model in models])
    return start + lambda_ * merge_flat(tau, weight, density, form, clip).view(start.shape)
