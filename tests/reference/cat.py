"""Sun et al. 2025, "CAT Merging: A Training-Free Approach for Resolving Conflicts in Model Merging", section on linear weights:
conflicts summed pair by pair, and projectors as matrices."""

import torch


def cat(base, models, grams, *, lambda_=1.0, trade_off=1.0, rank=8, order="largest", rescale=True, **_):
    base = base.double()
    vectors = [model.double() - base for model in models]
    m, k = base.shape[0], len(models)
    projectors = []
    for i in range(k):
        conflict = torch.zeros(m, m, dtype=torch.float64)
        for j in range(k):
            if j != i:
                # as inner products of outputs: |B^T delta_j x_i|^2 - trade_off |B^T delta_j x_j|^2
                conflict += vectors[j] @ (grams[i].double() - trade_off * grams[j].double()) @ vectors[j].T
        values, directions = torch.linalg.eigh((conflict + conflict.T) / 2)
        ranking = range(m) if order == "smallest" else reversed(range(m))
        least = 1e-6 * float(values.abs().max())
        wanted = [d for d in ranking if order == "smallest" or values[d] > least][:rank]
        if not (values > least).any():
            wanted = []
        removed = sum((torch.outer(directions[:, d], directions[:, d]) for d in wanted), torch.zeros(m, m).double())
        projectors.append(torch.eye(m, dtype=torch.float64) - removed)
    for j in range(k):
        for i in range(k):
            if i != j:
                norm = vectors[j].norm()
                vectors[j] = projectors[i] @ vectors[j]
                if rescale:
                    vectors[j] = vectors[j] * norm / vectors[j].norm()
    return base + lambda_ * sum(vectors)
