"""Zhang et al. 2025, "Expert Merging", with the loss of one block at a time: whole models in memory, in float64, by autograd."""

import contextlib
import copy

import torch

from tests.reference.regmean_plus import set_parameters


def expert_merging(base, models, coefficients):
    """One tensor, given the coefficients of each model's chunks: the first chunks have one element more."""
    flat, merged = base.double().flatten(), base.double().flatten().clone()
    for model, own in zip(models, coefficients, strict=True):
        count = len(own)
        for e in range(len(flat)):
            small, more = divmod(len(flat), count)
            chunk = e // (small + 1) if e < more * (small + 1) else more + (e - more * (small + 1)) // small
            merged[e] += float(own[chunk]) * (float(model.double().flatten()[e]) - float(flat[e]))
    return merged.view(base.shape)


def outputs_of(model, block, sequences):
    """What a block computes, rows of all tokens."""
    rows = []

    def keep(_, __, found):
        rows.append((found[0] if isinstance(found, tuple) else found).flatten(0, -2))
        # what comes behind the block is not needed
        raise _Enough

    hook = model.get_submodule(block).register_forward_hook(keep)
    for sequence in sequences:
        with contextlib.suppress(_Enough):
            model(**sequence)
    hook.remove()
    return torch.cat(rows)


def mixed(bases, deltas, raw):
    found = {}
    for name, base in bases.items():
        flat = base.flatten()
        for vector, own in zip(deltas[name], raw[name], strict=True):
            pieces = [c.sigmoid() * part for c, part in zip(own, vector.flatten().tensor_split(len(own)), strict=True)]
            flat = flat + torch.cat(pieces)
        found[name] = flat.view(base.shape)
    return found


def expert_merging_walk(base, models, data, blocks, *, start=0.1, steps=30, rate=0.5, regulariser=0.1, chunks=1):
    """Return the merged model and the coefficients by tensor, shape [models, chunks]; models of float64."""
    merged = copy.deepcopy(base)
    logit = torch.logit(torch.tensor(start, dtype=torch.float64))
    first = logit.sigmoid()
    bases = {name: own.detach().clone() for name, own in base.named_parameters()}
    deltas = {name: [model.get_parameter(name).detach() - own for model in models] for name, own in bases.items()}
    set_parameters(merged, {name: own + first * sum(deltas[name]) for name, own in bases.items()})
    coefficients = {}
    for block in blocks:
        inside = {name: own for name, own in bases.items() if name.startswith(f"{block}.")}
        raw = {
            name: torch.full((len(models), chunks), float(logit), dtype=torch.float64, requires_grad=True)
            for name in inside
        }
        with torch.no_grad():
            targets = [outputs_of(model, block, own) for model, own in zip(models, data, strict=True)]
        optimiser = torch.optim.Adam(raw.values(), lr=rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        units = None
        for _ in range(steps):
            weights = mixed(inside, deltas, raw)

            def run(sequences, weights=weights, block=block):
                return outputs_of(_With(merged, weights), block, sequences)

            errors = [(run(own) - target).square().mean() for own, target in zip(data, targets, strict=True)]
            units = units or [float(error.detach()) for error in errors]
            loss = sum(error / unit for error, unit in zip(errors, units, strict=True)) / len(models)
            pulls = [(own.sigmoid() - first).abs().mean(1).sum() for own in raw.values()]
            loss = loss + regulariser * sum(pulls) / len(pulls)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            falling.step()
        with torch.no_grad():
            set_parameters(merged, mixed(inside, deltas, raw))
        coefficients |= {name: own.detach().sigmoid() for name, own in raw.items()}
    return merged, coefficients


class _Enough(Exception):
    """Ends a forward."""


class _With:
    """A model with some of its parameters replaced."""

    def __init__(self, model, weights):
        self.model, self.weights = model, weights

    def __call__(self, **inputs):
        return torch.func.functional_call(self.model, self.weights, kwargs=inputs)

    def get_submodule(self, name):
        return self.model.get_submodule(name)
