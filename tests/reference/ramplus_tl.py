"""Yuan et al. 2026, "Behavior Knowledge Merge in Reinforced Agentic Models": RAM+, with counts inside one tensor.

rho_t = (elements that t and others changed) / (elements that only t changed); lambda_t = 1 + r clip(rho_t, 0, alpha).
"""

import torch

from tests.reference.ram import merge_changes


def factors(tensors, r, alpha, epsilon):
    """One factor per model, from (base, models) of one tensor or of all tensors of a model."""
    shared, unique = [0] * len(tensors[0][1]), [0] * len(tensors[0][1])
    for base, models in tensors:
        changed = [(model.double() - base.double()).abs() > epsilon for model in models]
        for t, mine in enumerate(changed):
            others = sum(
                (theirs for i, theirs in enumerate(changed) if i != t), torch.zeros(base.shape, dtype=torch.int64)
            )
            shared[t] += int((mine & (others > 0)).sum())
            unique[t] += int((mine & (others == 0)).sum())
    return [1 + r * min(s / u if u else float(s > 0) * alpha, alpha) for s, u in zip(shared, unique, strict=True)]


def ramplus_tl(base, models, *, r=0.1, alpha=0.2, epsilon=1e-5):
    return merge_changes(base, models, epsilon, factors([(base, models)], r, alpha, epsilon))
