"""Chen et al. 2025, "FW-Merging", algorithm 1 (one iteration) with the linear minimisation of Frank-Wolfe: over whole
models, each a list of tensors."""


def fw(base, models, gradients, *, weight=None, step=0.1, selection="hard", **_):
    n = len(models)
    weight = [1.0] * n if weight is None else list(weight)

    def slope(task, model):
        parts = zip(gradients[task], models[model], base, strict=True)
        return sum(float((g.double() * (m.double() - b.double())).sum()) for g, m, b in parts)

    if selection == "hard":
        total = [sum(weight[i] * slope(i, j) for i in range(n)) for j in range(n)]
        best = min(range(n), key=lambda j: total[j])
        chosen = [best] if total[best] < 0 else []
    else:
        chosen = []
        for i in range(n):
            best = min(range(n), key=lambda j: slope(i, j))
            if weight[i] and slope(i, best) < 0 and best not in chosen:
                chosen.append(best)
    merged = []
    for index, start in enumerate(base):
        to = [models[j][index].double() for j in chosen]
        target = sum(to) / len(to) if to else start.double()
        merged.append(start.double() + step * (target - start.double()))
    return merged
