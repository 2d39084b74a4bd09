"""Liu et al. 2025, "Sens-Merging", section 3: shares of the models in every layer, over a whole model."""

import math


def sens(base, models, layers, sensitivity, *, transfer=None, temperature=1.0, **given):
    """Merge models, each a list of tensors.

    Args:
        layers: The layer of each tensor.
        sensitivity: Of each model, a number for each tensor.
    """
    n = len(models)
    transfer = [1.0] * n if transfer is None else transfer
    kinds = sorted(set(layers), key=str)
    table = [
        [sum(s for s, own in zip(each, layers, strict=True) if own == kind) for kind in kinds] for each in sensitivity
    ]
    merged = []
    for index, start in enumerate(base):
        place = kinds.index(layers[index])
        scores = [
            row[place] / math.sqrt(sum(v**2 for v in row)) * (t / sum(transfer)) / temperature
            for row, t in zip(table, transfer, strict=True)
        ]
        total = sum(math.exp(score) for score in scores)
        result = start.double()
        for k in range(n):
            share = math.exp(scores[k]) / total
            result = result + given.get("lambda", 1.0) * n * share * (models[k][index].double() - start.double())
        merged.append(result)
    return merged
