"""The objective of Jin et al. 2023, equation 1, over coefficients of the task vectors: as one long least squares problem, with a
row for every output of every model on inputs that have its Gram matrix, and one for each pull towards a reference."""

import torch


def coefficients(base, models, grams, *, weight=None, alpha=1.0, ridge=1e-3, reference="average", normalize=False, **_):
    base, models = base.double(), [model.double() for model in models]
    weight = [1.0] * len(models) if weight is None else list(weight)
    vectors = [model - base for model in models]
    n = base.shape[1]
    off = alpha * torch.ones(n, n, dtype=torch.float64) + (1 - alpha) * torch.eye(n, dtype=torch.float64)
    columns, targets = [], []
    for w, own, gram in zip(weight, vectors, grams, strict=True):
        values, turn = torch.linalg.eigh(off * gram.double())
        inputs = turn * values.clamp(min=0).sqrt()
        outputs = [(vector @ inputs).flatten() for vector in vectors]
        target = (own @ inputs).flatten()
        size = w**0.5 / (float(target.norm()) if normalize else 1.0)
        columns.append(torch.stack(outputs, dim=1) * size)
        targets.append(target * size)
    design = torch.cat(columns)
    prior = torch.tensor(weight, dtype=torch.float64) / sum(weight) * (reference == "average")
    pull = torch.diag(design.norm(dim=0) * ridge**0.5)
    rows, right = torch.cat([design, pull]), torch.cat([*targets, pull @ prior])
    return torch.linalg.lstsq(rows, right.unsqueeze(1), driver="gelsd").solution[:, 0]


def gram_coefficients(base, models, grams, **parameters):
    base = base.double()
    found = coefficients(base, models, grams, **parameters)
    return base + sum(c * (model.double() - base) for c, model in zip(found, models, strict=True))
