"""Yang et al. 2024, "AdaMerging", for next-token predictions: whole models in memory, in float64, by autograd."""

import torch


def adamerging(base, models, coefficients):
    """One tensor, given a coefficient of each model."""
    merged = base.double().clone()
    for model, c in zip(models, coefficients, strict=True):
        merged += min(max(float(c), 0.0), 1.0) * (model.double() - base.double())
    return merged


def entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def adamerging_steps(
    base, models, data, *, group=lambda name: name, objective="entropy", start=0.3, steps=3, rate=0.001, weight=None
):
    """Return the coefficients by tensor, shape [models], and the losses of each step, by model, and after the last on the first one's data; models of float64.

    Args:
        base: The base.
        models: The models.
        data: For each step and each model the sequences of the step: arguments of the model.
        group: Name of the group of a tensor, all of which share coefficients.
        objective: "entropy", or "likelihood".
        start: First value.
        steps: Steps.
        rate: Step size.
        weight: Factor of each model's loss.
    """
    weight = weight or [1.0] * len(models)
    bases = {name: own.detach().clone() for name, own in base.named_parameters()}
    deltas = {name: [model.get_parameter(name).detach() - own for model in models] for name, own in bases.items()}
    raw = {group(name): torch.full((len(models),), start, dtype=torch.float64, requires_grad=True) for name in bases}
    optimiser = torch.optim.Adam(raw.values(), lr=rate)
    history = []
    for step in range(steps + 1):
        weights = {
            name: own + sum(c.clamp(0, 1) * d for c, d in zip(raw[group(name)], deltas[name], strict=True))
            for name, own in bases.items()
        }
        means = []
        for sequences in data[step if step < steps else 0]:
            terms = []
            for sequence in sequences:
                logits = torch.func.functional_call(base, weights, kwargs=sequence).logits[0, :-1]
                ids = sequence.get("decoder_input_ids", sequence["input_ids"])[0, 1:]
                likely = -logits.log_softmax(-1)[range(len(ids)), ids]
                terms.append(entropy(logits) if objective == "entropy" else likely)
            means.append(torch.cat(terms).mean())
        history.append([float(own.detach()) for own in means])
        if step == steps:
            break
        optimiser.zero_grad()
        sum(w * own for w, own in zip(weight, means, strict=True)).backward()
        optimiser.step()
    return {name: raw[group(name)].detach() for name in bases}, history
