"""Nasery et al. 2025, "PLeaS", with all units merged: least squares on the inputs themselves, in float64."""

import copy

import torch

from tests.reference.regmean_plus import average, inputs_of, set_parameters, transposed


def pleas(models, inputs, ridge=0.0):
    """One matrix. inputs: what it receives in each model, shape [tokens, columns]; ridge: towards the average."""
    mean_inputs = sum(rows.double() for rows in inputs) / len(inputs)
    outputs = [rows.double() @ model.double().T for model, rows in zip(models, inputs, strict=True)]
    start = sum(model.double() for model in models) / len(models)
    missing = sum(outputs) / len(outputs) - mean_inputs @ start.T
    pull = (ridge * mean_inputs.square().sum() / mean_inputs.shape[1]) ** 0.5
    rows = torch.cat([mean_inputs, pull * torch.eye(mean_inputs.shape[1], dtype=torch.float64)])
    missing = torch.cat([missing, torch.zeros(mean_inputs.shape[1], missing.shape[1], dtype=torch.float64)])
    return start + torch.linalg.lstsq(rows, missing).solution.T


def pleas_walk(models, sequences, blocks, ridge=0.0):
    """Whole models that are aligned, all on the same sequences; what is in no matrix of a block is averaged."""
    merged = copy.deepcopy(models[0])
    values = {name: average(models, name) for name, _ in merged.named_parameters()}
    for block in blocks:
        received = [inputs_of(model, block, sequences) for model in models]
        for name in received[0]:
            turn = (lambda w: w.T) if transposed(merged, name) else (lambda w: w)
            values[name] = turn(
                pleas([turn(m.state_dict()[name]) for m in models], [rows[name] for rows in received], ridge)
            )
    set_parameters(merged, values)
    return merged
