"""Nguyen et al. 2025, "RegMean++", algorithm 1: whole models in memory, one sequence at a time, the solve of RegMean."""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.reference.regmean import regmean


def inputs_of(model, block, sequences):
    """What every matrix of a block receives: rows of all tokens, by the name of its parameter."""
    rows = {}
    hooks = []
    for name, module in model.named_modules():
        if name.startswith(f"{block}.") and isinstance(module, nn.Linear | Conv1D):
            rows[f"{name}.weight"] = []
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: rows[f"{name}.weight"].append(args[0].flatten(0, -2).double())
                )
            )
    with torch.no_grad():
        for sequence in sequences:
            model(**sequence)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(own) for name, own in rows.items()}


def average(models, name):
    return sum(model.state_dict()[name].double() for model in models) / len(models)


def set_parameters(model, values):
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)


def transposed(model, name):
    return isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)


def regmean_plus(base, models, data, blocks, **parameters):
    """Return the merged model.

    base, models: modules of transformers; data: the sequences of each model; blocks: names of the blocks in order.
    """
    merged = copy.deepcopy(base)
    names = [name for name, _ in base.named_parameters()]
    inside = [name for name in names if any(name.startswith(f"{block}.") for block in blocks)]
    set_parameters(merged, {name: average(models, name) for name in names if name not in inside})
    for block in blocks:
        own = [name for name in inside if name.startswith(f"{block}.")]
        received = []
        for model, sequences in zip(models, data, strict=True):
            mixed = copy.deepcopy(merged)
            set_parameters(mixed, {name: model.state_dict()[name] for name in own})
            received.append(inputs_of(mixed, block, sequences))
        values = {}
        for name in own:
            if name not in received[0]:
                values[name] = average(models, name)
                continue
            grams = [rows[name].T @ rows[name] / len(rows[name]) for rows in received]
            turn = (lambda w: w.T) if transposed(base, name) else (lambda w: w)
            start, ends = turn(base.state_dict()[name]), [turn(model.state_dict()[name]) for model in models]
            values[name] = turn(regmean(start, ends, grams, **parameters))
        set_parameters(merged, values)
    return merged
