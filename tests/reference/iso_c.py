"""Marczak et al. 2025, "No Task Left Behind", section 4.1 and algorithm 1: theta_0 + alpha mean(sigma) U V^T."""

from tests.reference.decompositions import triplets, vectors


def iso_c(base, models, *, weight=1.0, divisor="rank", rank_tolerance=0.0, **other):
    total = sum(vectors(base, models, weight, cut=rank_tolerance == 0))
    u, s, v = triplets(total, tolerance=rank_tolerance)
    count = min(total.shape) if divisor == "size" else len(s)
    return base.double() + other.get("lambda", 1.0) * (s.sum() / max(count, 1)) * u @ v.T
