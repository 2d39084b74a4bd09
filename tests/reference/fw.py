"""Chen et al. 2025, "FW-Merging", algorithm 1 with the linear minimisation of Frank-Wolfe, for next-token predictions: whole
models in memory, in float64. The merge itself moves, not coefficients of it."""

import torch


def fw(base, models, coefficients):
    """One tensor, given a coefficient of each model."""
    merged = base.double().clone()
    for model, c in zip(models, coefficients, strict=True):
        merged += float(c) * (model.double() - base.double())
    return merged


def moved(point, models, gradients, length, *, selection="hard", **_):
    """Return a point, a list of tensors, after one step: towards models, given the gradient of each loss."""

    def slope(gradient, model):
        return sum(float((g * (m - p)).sum()) for g, m, p in zip(gradient, model, point, strict=True))

    slopes = [[slope(gradient, model) for model in models] for gradient in gradients]
    if selection == "hard":
        slopes = [[sum(column) for column in zip(*slopes, strict=True)]]
    chosen = {row.index(min(row)) for row in slopes if min(row) < 0}
    if not chosen:
        return point
    targets = [sum(models[j][index] for j in chosen) / len(chosen) for index in range(len(point))]
    return [p + length * (target - p) for p, target in zip(point, targets, strict=True)]


def fw_steps(base, models, data, *, granularity="model", selection="hard", start=0.3, steps=3, rate=0.1, weight=None):
    """Return the merged weights, by name, and the losses of each step, by model; models of float64.

    Args:
        base: The base.
        models: The models.
        data: For each step and each model the sequences of the step: arguments of the model.
        granularity: "model", or "tensor".
        selection: "hard", or "soft".
        start: Factor of the task vectors in the first merge.
        steps: Steps.
        rate: Length of the first step.
        weight: Factor of each model's loss.
    """
    weight = weight or [1.0] * len(models)
    own = [{name: tensor.detach() for name, tensor in model.named_parameters()} for model in (base, *models)]
    point = {name: tensor + start * sum(m[name] - tensor for m in own[1:]) for name, tensor in own[0].items()}
    history = []
    for step in range(steps):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in point.items()}
        gradients, means = [], []
        for w, sequences in zip(weight, data[step], strict=True):
            terms = []
            for sequence in sequences:
                logits = torch.func.functional_call(base, leaves, kwargs=sequence).logits[0, :-1]
                ids = sequence["input_ids"][0, 1:]
                terms.append(-logits.log_softmax(-1)[range(len(ids)), ids])
            mean = torch.cat(terms).mean()
            gradients.append(torch.autograd.grad(w * mean, [*leaves.values()]))
            means.append(float(mean.detach()))
        history.append(means)
        names = [*point]
        pieces = [names] if granularity == "model" else [[name] for name in names]
        for piece in pieces:
            there = [names.index(name) for name in piece]
            found = moved(
                [point[name] for name in piece],
                [[m[name] for name in piece] for m in own[1:]],
                [[g[index] for index in there] for g in gradients],
                2 * rate / (step + 2),
                selection=selection,
            )
            point |= dict(zip(piece, found, strict=True))
    return point, history
