"""Wei et al. 2026, "Closed-Form Spectral Regularization for Multi-Task Model Merging": ASWUDI."""

import math

import torch

from tests.reference.decompositions import vectors
from tests.reference.wudi import first, quadratic, walk


def aswudi(base, models, *, start="sum", **scale):
    deltas = vectors(base, models)
    c, d = quadratic(deltas, deltas, [delta.norm() for delta in deltas])
    values = torch.linalg.eigvalsh(c).clamp(min=0)
    k = math.ceil(values.sqrt().sum() ** 2 / values.sum())
    kept = torch.arange(len(values)) >= len(values) - k
    merged = walk(c, d, first(deltas, start), lambda values: kept.double())
    return base.double() + scale.get("lambda", 1.0) * merged
