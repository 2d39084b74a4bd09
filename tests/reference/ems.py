"""Li et al. 2024, "EMS", from the description: global and local score, evict, then merge above a similarity."""

from .kv_scores import best, cosine, scores


def ems(keys, values, queries, scaling, attention, chances, *, budget, sinks, window, similarity):
    """Keys and values of what stays, one key head, float64."""
    everywhere = [a / c for a, c in zip(attention, chances, strict=True)]
    here = scores(queries, keys, scaling)
    score = [g / max(everywhere) + h / max(here) for g, h in zip(everywhere, here, strict=True)]
    kept = best(score, budget, sinks, window)
    sums = {j: [score[j], score[j] * keys[j], score[j] * values[j]] for j in kept}
    for i in range(len(keys)):
        if i in kept:
            continue
        j = max(kept, key=lambda j: cosine(keys[i], keys[j]))
        if cosine(keys[i], keys[j]) > similarity:
            sums[j] = [sums[j][0] + score[i], sums[j][1] + score[i] * keys[i], sums[j][2] + score[i] * values[i]]
    return [(key / total, value / total) for total, key, value in sums.values()]
