"""Gauthier-Caron et al. 2024, "Differentiable Adaptive Merging": whole models in memory, in float64, by autograd."""

from itertools import combinations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def dam(models, coefficients):
    """One tensor, given what each model's is multiplied with."""
    merged = torch.zeros(models[0].shape, dtype=torch.float64)
    for model, own in zip(models, coefficients, strict=True):
        merged += model.double() * own.double()
    return merged


def shapes_of(model):
    """The shape of the coefficients of every tensor: one for each input of a matrix, one for all else."""
    found = {name: (1,) for name, _ in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and f"{name}.weight" in found:
            found[f"{name}.weight"] = (1, module.weight.shape[1])
        if isinstance(module, Conv1D):
            found[f"{name}.weight"] = (module.weight.shape[0], 1)
    return found


def dam_steps(models, data, *, steps=3, rate=0.001, temperature=2.0, similarity=0.01, overlap=0.0):
    """Return the coefficients by tensor, shape [models, ...], and the losses of each step, by model, and after the last on the first one's data; models of float64.

    Args:
        models: The models.
        data: For each step and each model the sequences of the step: arguments of the model.
        steps: Steps.
        rate: Step size.
        temperature: T.
        similarity: Factor of the cosines.
        overlap: Factor of what is shared.
    """
    count = len(models)
    raw = {
        name: torch.full((count, *shape), 1 / count, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes_of(models[0]).items()
    }
    optimiser = torch.optim.Adam(raw.values(), lr=rate)
    history = []
    for step in range(steps + 1):
        weights = {
            name: sum(c * model.get_parameter(name).detach() for c, model in zip(own, models, strict=True))
            for name, own in raw.items()
        }
        means = []
        for model, sequences in zip(models, data[step if step < steps else 0], strict=True):
            terms = []
            for sequence in sequences:
                merged = torch.func.functional_call(models[0], weights, kwargs=sequence).logits[0, :-1] / temperature
                with torch.no_grad():
                    wanted = (model(**sequence).logits[0, :-1] / temperature).softmax(-1)
                terms.append(temperature**2 * (wanted * (wanted.log() - merged.softmax(-1).log())).sum(-1))
            means.append(torch.cat(terms).mean())
        history.append([float(own.detach()) for own in means])
        if step == steps:
            break
        penalty = 0
        for own in raw.values():
            pairs = list(combinations([each.flatten() for each in own], 2))
            if own[0].numel() > 1:
                penalty = penalty + similarity * sum(a @ b / a.norm() / b.norm() for a, b in pairs) / len(pairs)
                # half the slope to each where both are equal
                smaller = [((a.abs() + b.abs() - (a.abs() - b.abs()).abs()) / 2).sum() for a, b in pairs]
                penalty = penalty + overlap * sum(smaller) / len(pairs)
        optimiser.zero_grad()
        (sum(means) + penalty).backward()
        optimiser.step()
    return {name: own.detach() for name, own in raw.items()}, history
