"""Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", eq. 5, 6 and section 5.

tau_MTL = sum_t tau_t (or TIES with the sum); m_t = 1{|theta_t - theta_0| >= |theta_MTL - theta_t| lambda_t}, strict in
the authors' code; m_consensus = 1{sum_t m_t >= k}; theta = theta_0 + alpha m_consensus * tau_MTL.
"""

import torch


def ties_sum(deltas, density):
    """Yadav et al. 2023, trim, elect, and the disjoint sum; an exact tie elects plus."""
    trimmed = []
    for delta, share in zip(deltas, density, strict=True):
        values = delta.abs().flatten().sort(descending=True).values
        kept = max(int(share * len(values)), 1)
        trimmed.append(delta * (delta.abs() >= values[kept - 1]) if share > 0 else torch.zeros_like(delta))
    stacked = torch.stack(trimmed)
    majority = torch.where(stacked.sum(dim=0) < 0, -1.0, 1.0).double()
    return (stacked * (torch.sign(stacked) == majority)).sum(dim=0)


def tall_masks(base, finetuned, multi, lambdas):
    """Which tasks need an element, from the weights themselves as in the authors' code."""
    return [(base - own).abs() > (multi - own).abs() * factor for own, factor in zip(finetuned, lambdas, strict=True)]


def consensus(
    base, models, *, weight=1.0, lambda_=1.0, mask_lambda=0.4, k=2, vector="sum", density=0.2, trim_over="tensor"
):
    n = len(models)
    weight, mask_lambda, density = (
        list(value) if isinstance(value, list) else [value] * n for value in (weight, mask_lambda, density)
    )
    start = base.double()
    deltas = torch.stack([w * (model.double() - start) for w, model in zip(weight, models, strict=True)])
    tau = deltas.sum(dim=0) if vector == "sum" else ties_sum(deltas, density)
    # around zero: adding the base and subtracting it again would round
    zero = torch.zeros_like(start)
    agreed = sum(mask.int() for mask in tall_masks(zero, list(deltas), zero + tau, mask_lambda)) >= k
    return start + lambda_ * tau * agreed
