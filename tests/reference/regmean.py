"""Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", equation 2 and section 3.3: with the
normal equations of the whole problem, output by output, and a ridge towards a reference."""

import torch


def regmean(base, models, grams, *, weight=None, alpha=0.5, ridge=1e-4, reference="average", limit=2.0, **_):
    base, models = base.double(), [model.double() for model in models]
    weight = [1.0] * len(models) if weight is None else list(weight)
    mean = sum(w * model for w, model in zip(weight, models, strict=True)) / sum(weight)
    r = mean if reference == "average" else base
    n = base.shape[1]
    off = alpha * torch.ones(n, n, dtype=torch.float64) + (1 - alpha) * torch.eye(n, dtype=torch.float64)
    shrunk = [w * off * gram.double() for w, gram in zip(weight, grams, strict=True)]
    a = sum(shrunk)
    e = ridge * a.diagonal().mean()
    longest = max(limit * max((model - base).norm() for model in models), (1 + 1e-9) * (r - base).norm())
    found = _solved(shrunk, models, r, a, e)
    while (found - base).norm() > longest:
        e *= 10
        found = _solved(shrunk, models, r, a, e)
    return found


def _solved(shrunk, models, r, a, e):
    n = len(a)
    rows = []
    for row in range(r.shape[0]):
        # the gradient of sum_i (w - w_i) G_i (w - w_i)^T + e |w - r|^2 is zero
        right = sum(g @ model[row] for g, model in zip(shrunk, models, strict=True)) + e * r[row]
        rows.append(torch.linalg.solve(a + e * torch.eye(n, dtype=torch.float64), right))
    return torch.stack(rows)
