"""Gu et al. 2026, "FeatCal", linear weights only: as in the authors' solver, in float64, with whole models in memory."""

import copy

import torch

from tests.reference.regmean_plus import average, inputs_of, set_parameters, transposed
from tests.reference.wudi import wudi


def featcal(base, models, covariances, crosses, *, weight=None, rho=2.2, alpha=0.25, ridge=0.05, **given):
    """One matrix. covariances: E[x x^T]; crosses: E[x y^T], x in the merged model and y in the model itself."""
    weight = [1.0] * len(models) if weight is None else list(weight)
    base, models = base.double(), [model.double() for model in models]
    factor = given.get("lambda", 1.0)
    if given.get("start") == "wudi":
        kept = [model for w, model in zip(weight, models, strict=True) if w > 0]
        anchor = base + factor * (wudi(base, kept) - base)
    else:
        total = sum(w * (model - base) for w, model in zip(weight, models, strict=True))
        merged = base + factor * total / sum(weight)
        anchor = rho * merged + (1 - rho) * base
    n = base.shape[1]
    left = ridge * torch.eye(n, dtype=torch.float64)
    right = ridge * anchor.T
    for w, model, covariance, cross in zip(weight, models, covariances, crosses, strict=True):
        covariance, cross = covariance.double(), cross.double()
        s = w / covariance.norm()
        target = alpha * cross + (1 - alpha) * covariance
        left = left + s * covariance
        right = right + s * target @ model.T
    return torch.linalg.solve(left, right).T


def featcal_walk(base, models, data, blocks, **parameters):
    """Whole models: blocks are corrected one after the other, the rest is averaged."""
    names = [name for name, _ in base.named_parameters()]
    merged = copy.deepcopy(base)
    set_parameters(merged, {name: average(models, name) for name in names})
    for block in blocks:
        students = [inputs_of(merged, block, sequences) for sequences in data]
        teachers = [inputs_of(model, block, sequences) for model, sequences in zip(models, data, strict=True)]
        values = {}
        for name in students[0]:
            covariances = [rows[name].T @ rows[name] / len(rows[name]) for rows in students]
            crosses = [s[name].T @ t[name] / len(s[name]) for s, t in zip(students, teachers, strict=True)]
            turn = (lambda w: w.T) if transposed(base, name) else (lambda w: w)
            start, ends = turn(base.state_dict()[name]), [turn(model.state_dict()[name]) for model in models]
            values[name] = turn(featcal(start, ends, covariances, crosses, **parameters))
        set_parameters(merged, values)
    return merged
