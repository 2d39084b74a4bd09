"""He et al. 2025, "Task-KV": the semantic separator and what heads keep; one row, float64, written as loops."""

import math

from .kv_scores import best, scores


def head_output(queries, keys, values, scaling):
    """Mean over queries of one query head's attention output; the last n keys belong to the n queries."""
    total = 0 * values[0]
    for j, query in enumerate(queries):
        own = len(keys) - len(queries) + j
        mass = [math.exp(scaling * float(query @ keys[t])) for t in range(own + 1)]
        total = total + sum(m * values[t] for t, m in enumerate(mass)) / sum(mass)
    return total / len(queries)


def separator(queries, keys, values, scaling, projection):
    """Distance of each query head from the semantic centre; `queries` by query head, `keys`, `values` by key head."""
    group, width = len(queries) // len(keys), len(values[0][0])
    said = [
        projection[:, h * width : (h + 1) * width]
        @ head_output(queries[h], keys[h // group], values[h // group], scaling)
        for h in range(len(queries))
    ]
    centre = sum(said) / len(said)
    return [math.sqrt(float((each - centre) @ (each - centre))) for each in said]


def other_head(queries, keys, scaling, *, sinks, middle, window):
    """Entries that stay in a head that is not heterogeneous; `queries` by query head of its group."""
    return best(scores(queries, keys, scaling), sinks + middle + window, sinks, window)
