"""Attention that keys get from the last queries, one key head, float64, written as loops."""

import math


def scores(queries, keys, scaling, counts=None):
    """Sums over queries of softmax, averaged over the query heads that share the key head.

    `queries`: one list of vectors per query head, those of the last tokens; `counts`: tokens that each key stands for.
    """
    length = len(keys)
    total = [0.0] * length
    for head in queries:
        for j, query in enumerate(head):
            own = length - len(head) + j
            logits = [scaling * float(query @ keys[t]) for t in range(own + 1)]
            mass = [math.exp(each) * (counts[t] if counts else 1.0) for t, each in enumerate(logits)]
            for t, each in enumerate(mass):
                total[t] += each / sum(mass) / len(queries)
    return total


def best(score, budget, sinks, window):
    """Sinks, window and the highest between them, in order."""
    inner = sorted(range(sinks, len(score) - window), key=lambda t: -score[t])[: budget - sinks - window]
    return [*range(sinks), *sorted(inner), *range(len(score) - window, len(score))]


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
