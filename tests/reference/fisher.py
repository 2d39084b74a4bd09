"""Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", equation 6 and section 3.3: entry by entry, over
whole models."""

import math


def fisher(models, fishers, *, weight=None, normalize=True, floor=1e-6, **_):
    """Merge models, each a list of tensors; `fishers` likewise."""
    n = len(models)
    weight = [1.0] * n if weight is None else list(weight)
    squares = [sum(float(tensor.double().square().sum()) for tensor in own) for own in fishers]
    counts = [sum(tensor.numel() for tensor in own) for own in fishers]
    if normalize:
        units = [math.sqrt(square / count) for square, count in zip(squares, counts, strict=True)]
    else:
        units = [math.sqrt(sum(squares) / sum(counts))] * n
    merged = []
    for index, like in enumerate(models[0]):
        result = like.double().clone().reshape(-1)
        for place in range(result.numel()):
            pull = total = 0.0
            for k in range(n):
                own = float(fishers[k][index].reshape(-1)[place]) / (units[k] or 1.0)
                amount = weight[k] * max(own, floor)
                pull += amount * float(models[k][index].reshape(-1)[place])
                total += amount
            result[place] = pull / total
        merged.append(result.view(like.shape))
    return merged
