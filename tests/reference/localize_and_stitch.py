"""He et al. 2024, "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic", sections 3.2 and 3.3.

Dataless localization: gamma_i = the entries of tau_i with the top-k magnitude. Stitching: gamma'_i = gamma_i divided by
the number of masks that hold the position; theta = theta_0 + sum_i gamma'_i * tau_i.
"""

import torch


def localize_and_stitch(base, models, *, density=0.05, trim_over="tensor"):
    density = density if isinstance(density, list) else [density] * len(models)
    base = base.double()
    deltas = [model.double() - base for model in models]
    masks = []
    for delta, share in zip(deltas, density, strict=True):
        values = delta.abs().flatten().sort(descending=True).values
        k = max(int(share * len(values)), 1)
        chosen = delta.abs() >= values[k - 1] if share > 0 else torch.zeros_like(delta, dtype=torch.bool)
        masks.append((chosen & (delta != 0)).double())
    overlap = torch.stack(masks).sum(dim=0)
    merged = base.clone()
    for delta, mask in zip(deltas, masks, strict=True):
        reciprocal = torch.where(mask * overlap > 0, 1 / (mask * overlap), 0.0)
        merged += reciprocal * delta
    return merged
