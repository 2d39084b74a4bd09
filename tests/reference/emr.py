"""Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging", algorithm 1, the unified task vector.

gamma_uni = sgn(sum_t tau_t); epsilon_uni = the largest |tau_t| among those of that sign; tau_uni = gamma_uni * epsilon_uni.
An exact 0 counts as minus, as in the authors' code.
"""

import torch


def emr(base, models):
    base = base.double()
    deltas = [model.double() - base for model in models]
    flag = (sum(deltas) > 0) * 2.0 - 1.0
    largest = torch.zeros_like(base)
    for delta in deltas:
        largest = torch.maximum(largest, (delta * ((delta * flag) > 0)).abs())
    return base + flag.double() * largest


def emr_restored(base, models, merged, *, rescale_by="sum", rescale_over="model"):
    """M_t = (tau_t * tau_uni > 0), lambda_t = sum |tau_t| / sum |M_t * tau_uni|, theta_t = theta + lambda_t M_t tau_uni.

    Of one tensor, for which all ways to rescale are the same; with tau_uni as the merged tensor has it.
    """
    unified = merged - base
    found = []
    for model in models:
        mask = ((model - base) * unified > 0).double()
        under = (mask * unified).abs().sum()
        factor = (model - base).abs().sum() / under if under > 0 else 1.0
        found.append(base + factor * mask * unified)
    return found


def emr_factors(bases, models, mergeds, rescale_by):
    """One factor for each model, over a list of tensors; "mean" as the authors' code for language models has it."""
    factors = []
    for i in range(len(models[0])):
        own = under = 0.0
        for base, each, merged in zip(bases, models, mergeds, strict=True):
            delta, unified = each[i].double() - base.double(), merged.double() - base.double()
            mask = (delta * unified > 0).double()
            one, other = delta.abs(), (mask * unified).abs()
            own += float(one.mean() if rescale_by == "mean" else one.sum())
            under += float(other.mean() if rescale_by == "mean" else other.sum())
        factors.append(own / under)
    return factors
