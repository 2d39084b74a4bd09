"""Wan et al. 2024, "D2O", section 3.3: similarity, moving threshold, weights."""

import math

from .kv_scores import best, cosine


def d2o(keys, values, score, *, budget, sinks, window, beta, threshold):
    """Keys and values of what stays and the threshold; one key head, float64."""
    kept = best(score, budget, sinks, window)
    gone = [t for t in range(len(keys)) if t not in kept]
    likeness = {i: [cosine(keys[i], keys[j]) for j in kept] for i in gone}
    mean = sum(max(likeness[i]) for i in gone) / len(gone)
    threshold = mean if threshold is None else beta * mean + (1 - beta) * threshold
    result = []
    for at, j in enumerate(kept):
        merged = [i for i in gone if max(likeness[i]) == likeness[i][at] and likeness[i][at] >= threshold]
        total = math.e + sum(math.exp(likeness[i][at]) for i in merged)
        key, value = math.e / total * keys[j], math.e / total * values[j]
        for i in merged:
            key = key + math.exp(likeness[i][at]) / total * keys[i]
            value = value + math.exp(likeness[i][at]) / total * values[i]
        result.append((key, value))
    return result, threshold
