"""Wang et al. 2024, "Model tells you where to merge", section 3, with the similarity's threshold set by the budget."""

import math

from .kv_scores import cosine, scores


def kvmerger(keys, values, queries, scaling, *, budget, sinks, window, heavy, counts):
    """Keys, values and counts of what stays, one key head, float64."""
    length = len(keys)
    score = scores(queries, keys, scaling, counts)
    free = set(range(sinks, length - window))
    free -= set(sorted(free, key=lambda t: -score[t])[:heavy])
    pairs = [t for t in range(1, length) if t in free and t - 1 in free]
    pairs.sort(key=lambda t: -cosine(keys[t], keys[t - 1]))
    joined = set(pairs[: length - budget])
    runs = []
    for t in range(length):
        if t in joined:
            runs[-1].append(t)
        else:
            runs.append([t])
    result = []
    for run in runs:
        pivot = max(run, key=lambda t: score[t])
        distances = [float(((keys[pivot] - keys[t]) ** 2).sum()) for t in run]
        variance = sum(distances) / len(run)
        weight = [
            counts[t] * (math.exp(-d / (2 * variance)) if variance else 1.0)
            for t, d in zip(run, distances, strict=True)
        ]
        share = [w / sum(weight) for w in weight]
        result.append(
            (
                sum(w * keys[t] for w, t in zip(share, run, strict=True)),
                sum(w * values[t] for w, t in zip(share, run, strict=True)),
                sum(counts[t] for t in run),
            )
        )
    return result
