"""Zhang et al. 2025, "Expert Merging", with the loss of the paper: whole models in memory, in float64, by autograd."""

import torch

from tests.reference.expert_merging import mixed


def expert_merging_whole(base, models, raw):
    """One tensor, given c of each model's chunks: the first chunks have one element more."""
    merged = base.double().flatten().clone()
    for model, own in zip(models, raw, strict=True):
        delta = model.double().flatten() - base.double().flatten()
        small, more = divmod(len(delta), len(own))
        begin = 0
        for k, c in enumerate(own.double()):
            end = begin + small + (k < more)
            merged[begin:end] += delta[begin:end] / (1 + torch.exp(-c))
            begin = end
    return merged.view(base.shape)


def steps_of(
    base, models, data, *, start=0.1, steps=3, rate=0.5, regulariser=0.1, temperature=1.0, chunks=1, weight=None
):
    """Return c by tensor, shape [models, chunks], and the losses of each step, by model, and after the last on the first one's data; models of float64.

    Args:
        base: The base.
        models: The models.
        data: For each step and each model the sequences of the step: arguments of the model.
        start: First value of the sigmoid of c.
        steps: Steps.
        rate: Step size.
        regulariser: Pulls towards start.
        temperature: T.
        chunks: Of every tensor.
        weight: Factor of each model's loss.
    """
    weight = weight or [1.0] * len(models)
    bases = {name: own.detach().clone() for name, own in base.named_parameters()}
    deltas = {name: [model.get_parameter(name).detach() - own for model in models] for name, own in bases.items()}
    first = torch.logit(torch.tensor(start, dtype=torch.float64))
    raw = {name: first.repeat(len(models), min(chunks, own.numel())).requires_grad_() for name, own in bases.items()}
    optimiser = torch.optim.Adam(raw.values(), lr=rate)
    history = []
    for step in range(steps + 1):
        weights, means = mixed(bases, deltas, raw), []
        for model, sequences in zip(models, data[step if step < steps else 0], strict=True):
            terms = []
            for sequence in sequences:
                merged = torch.func.functional_call(base, weights, kwargs=sequence).logits[0, :-1] / temperature
                with torch.no_grad():
                    wanted = (model(**sequence).logits[0, :-1] / temperature).softmax(-1)
                # the paper's cross-entropy, without the entropy of the model itself, which is constant
                cross = -(wanted * merged.log_softmax(-1)).sum(-1) + (wanted * wanted.log()).sum(-1)
                terms.append(temperature**2 * cross)
            means.append(torch.cat(terms).mean())
        history.append([float(own.detach()) for own in means])
        if step == steps:
            break
        pulls = [(own.sigmoid() - first.sigmoid()).abs().mean(1).sum() for own in raw.values()]
        optimiser.zero_grad()
        (sum(w * own for w, own in zip(weight, means, strict=True)) + regulariser * sum(pulls) / len(pulls)).backward()
        optimiser.step()
    return {name: own.detach() for name, own in raw.items()}, history
