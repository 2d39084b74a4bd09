"""Marczak et al. 2025, "No Task Left Behind", section 4.2 and algorithm 2."""

import torch

from tests.reference.decompositions import nearest_orthonormal, triplets, vectors


def iso_cts(base, models, *, weight=1.0, common_space_fraction=0.8, divisor="rank", rank_tolerance=0.0, **other):
    deltas = vectors(base, models, weight, cut=rank_tolerance == 0)
    r, n = min(base.shape), len(models)
    # the size of the common space, so that the rest is divided evenly
    k = int(r * common_space_fraction)
    s = min(round((r - k) / n), r // n) * n
    k = r - s
    common_u, common_s, common_v = triplets(sum(deltas), k, rank_tolerance)
    us, ss, vs = [], [], []
    for delta in deltas:
        outside = delta - common_u @ common_u.T @ delta
        u, sigma, v = triplets(outside, s // n)
        # what is left of a task vector inside of the common space is rounding
        real = sigma > 2.0**-20 * delta.norm()
        us.append(u[:, real]), ss.append(sigma[real]), vs.append(v[:, real])
    values = torch.cat([*ss, common_s])
    u = nearest_orthonormal(*us, common_u)
    v = nearest_orthonormal(*vs, common_v)
    mean = values.sum() / max(r if divisor == "size" else len(values), 1)
    return base.double() + other.get("lambda", 1.0) * mean * u @ v.T
