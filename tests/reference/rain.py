"""Huang et al. 2026, "RAIN-Merging", section on the null space: the projection of every row, from the inputs themselves."""

import torch


def rain(base, models, rows, *, ridge=1e-4, **given):
    """rows: the inputs of the chosen tokens, shape [tokens, columns]."""
    base, (first, second), rows = base.double(), [model.double() for model in models], rows.double()
    delta = second - base
    # the paper's ridge for the rows themselves, given the one for their mean, relative
    absolute = ridge * rows.square().sum(1).mean() / rows.shape[1] * len(rows)
    small = rows @ rows.T + absolute * torch.eye(len(rows), dtype=torch.float64)
    projected = delta - (delta @ rows.T) @ torch.linalg.solve(small, rows)
    return first + given.get("lambda", 1.0) * projected
