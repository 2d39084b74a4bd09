"""Wei et al. 2026, "Closed-Form Spectral Regularization for Multi-Task Model Merging": SWUDI."""

import math

import torch

from tests.reference.decompositions import vectors
from tests.reference.wudi import first, quadratic, walk


def swudi(base, models, *, time=1300.0, rank=0.65, start="sum", **scale):
    deltas = vectors(base, models)
    c, d = quadratic(deltas, deltas, [delta.norm() for delta in deltas])
    n = c.shape[0]
    kept = torch.arange(n) >= n - math.ceil(rank * n - 1e-9)
    share = walk(c, d, first(deltas, start), lambda values: torch.where(kept, 1 - torch.exp(-values * time), 0.0))
    return base.double() + scale.get("lambda", 1.0) * share
