"""Wan et al. 2024, "Knowledge Fusion of Chat LLMs", equation 8: W_jm = E_m dtheta_jm^2 / sum_j E_m dtheta_jm^2."""

import torch


def varm(base, models, *, variation="square", by="tensor"):
    base = base.double()
    changes = torch.stack([model.double() - base for model in models])
    size = changes**2 if variation == "square" else changes.abs()
    if by == "tensor":
        size = size.flatten(1).mean(dim=1).view(-1, *[1] * base.dim())
    total = size.sum(dim=0)
    share = torch.where(total > 0, size / total, 1 / len(models))
    return (share * torch.stack([model.double() for model in models])).sum(dim=0)
