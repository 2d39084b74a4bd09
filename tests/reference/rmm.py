"""Alipour and Mohammadi Amiri 2025, "Towards Reversible Model Merging For Low-rank Weights".

For each row of the left factors and each column of the right ones: the mean of the tasks' vectors, the leading left
singular vectors of the matrix of their differences from it, and its products with them. The factors are those of the
singular value decomposition; the average is ours.
"""

import torch


def rmm(base, models, *, weight=None, rank=16, basis=1, others="own", embeddings="others", **other):
    base = base.double()
    weight = weight or [1.0] * len(models)
    total = sum(w * (model.double() - base) for w, model in zip(weight, models, strict=True))
    return base + other.get("lambda", 1.0) * total / sum(weight)


def rmm_restored(base, models, merged, *, rank=16, basis=1):
    lefts, rights = [], []
    for model in models:
        left, values, right = torch.linalg.svd(model - base, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
        for j in range(left.shape[1]):
            column = left[:, j]
            if column[column.abs().argmax()] < 0:
                left[:, j], right[j] = -left[:, j], -right[j]
        lefts.append(left * values.sqrt())
        rights.append((values.sqrt().unsqueeze(1) * right).T)
    sides = []
    for side in (lefts, rights):
        rows = [[] for _ in models]
        for position in range(side[0].shape[0]):
            vectors = torch.stack([factor[position] for factor in side], dim=1)
            mean = vectors.mean(dim=1, keepdim=True)
            directions = torch.linalg.svd(vectors - mean, full_matrices=False)[0][:, : min(basis, len(models) - 1)]
            codes = directions.T @ (vectors - mean)
            again = mean + directions @ codes
            for task, row in enumerate(rows):
                row.append(again[:, task])
        sides.append([torch.stack(row) for row in rows])
    return [base + left @ right.T for left, right in zip(*sides, strict=True)]
