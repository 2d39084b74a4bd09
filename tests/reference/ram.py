"""Yuan et al. 2026, "Behavior Knowledge Merge in Reinforced Agentic Models": RAM, element by element.

Element p is changed by task t where |tau_t[p]| > epsilon. Changed by none it stays, by one it takes that task's change
times the task's factor (1 in RAM), by more it takes their mean.
"""

import torch


def merge_changes(base, models, epsilon, factors):
    base = base.double()
    vectors = torch.stack([model.double() - base for model in models])
    changed = vectors.abs() > epsilon
    tasks = changed.sum(dim=0)
    merged = torch.zeros_like(base)
    for vector, mine, factor in zip(vectors, changed, factors, strict=True):
        merged = torch.where(mine & (tasks == 1), factor * vector, merged)
    mean = (vectors * changed).sum(dim=0) / tasks.clamp(min=1)
    return base + torch.where(tasks > 1, mean, merged)


def ram(base, models, *, epsilon=1e-5):
    return merge_changes(base, models, epsilon, [1.0] * len(models))
