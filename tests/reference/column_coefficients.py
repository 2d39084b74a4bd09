"""The objective over coefficients of columns (Gauthier-Caron et al. 2024 have them) as one long least squares problem."""

import torch


def column_coefficients(base, models, grams, *, weight=None, ridge=0.01):
    base, models = base.double(), [model.double() for model in models]
    weight = [1.0] * len(models) if weight is None else list(weight)
    vectors = [model - base for model in models]
    columns = base.shape[1]
    blocks, targets = [], []
    for w, own, gram in zip(weight, vectors, grams, strict=True):
        values, turn = torch.linalg.eigh(gram.double())
        root = turn * (w * values.clamp(min=0)).sqrt()
        # an output for every row and every direction; an unknown for every model and column
        rows = [torch.einsum("oc,cd->odc", vector, root).reshape(-1, columns) for vector in vectors]
        blocks.append(torch.cat(rows, dim=1))
        targets.append((own @ root).flatten())
    design = torch.cat(blocks)
    prior = torch.tensor(weight, dtype=torch.float64).repeat_interleave(columns) / sum(weight)
    pull = torch.diag(design.norm(dim=0) * ridge**0.5)
    rows, right = torch.cat([design, pull]), torch.cat([*targets, pull @ prior])
    found = torch.linalg.lstsq(rows, right.unsqueeze(1), driver="gelsd").solution.view(len(models), columns)
    return base + sum(c * vector for c, vector in zip(found, vectors, strict=True))
