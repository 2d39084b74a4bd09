"""Tran et al. 2024, "Accelerating transformers with spectrum-preserving token merging", algorithm 1, one image, float64."""

import math

from .kv_scores import cosine


def pitome(metric, r, class_token, margin):
    """Pairs (token that goes, token that it goes into)."""
    places = range(1 if class_token else 0, len(metric))

    def energy(i):
        over = [cosine(metric[i], metric[j]) - margin for j in places]
        return sum(x if x >= 0 else math.exp(x) - 1 for x in over) / len(over)

    order = sorted(places, key=lambda i: -energy(i))[: 2 * r]
    return {(a, max(order[1::2], key=lambda b: cosine(metric[a], metric[b]))) for a in order[::2]}
