"""Inputs of models, by their Gram matrices, and how well a matrix keeps what models make of them."""

import torch


def make_grams(columns, n, *, tokens=400, seed=0):
    """Make Gram matrices of correlated inputs of unequal size, float64."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
        rows = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
        found.append(rows.T @ rows / tokens)
    return found


def loss(matrix, models, grams):
    """Return the sum over the models of the mean of |(matrix - model) x|^2."""
    return sum(
        float(((matrix - model) @ gram @ (matrix - model).T).trace()) for model, gram in zip(models, grams, strict=True)
    )
