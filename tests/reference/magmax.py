"""Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual Learning": the rule, element by element."""

import torch


def magmax(base, models, **other):
    base, models = base.double(), [model.double() for model in models]
    start = base.flatten().tolist()
    columns = zip(
        *([m - b for m, b in zip(model.flatten().tolist(), start, strict=True)] for model in models), strict=True
    )
    chosen = [max(sorted(changes, reverse=True), key=abs) for changes in columns]
    return base + other.get("lambda", 0.5) * torch.tensor(chosen, dtype=torch.float64).reshape(base.shape)
