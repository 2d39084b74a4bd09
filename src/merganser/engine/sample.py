"""What the run record tells of each tensor, measured on its first elements while they are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations, combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plan import PlannedTensor

SAMPLE = 1 << 16
"""Elements at the start of each tensor on which distances are measured."""

PAIR_SAMPLE = 1 << 14
"""Elements at the start of each tensor on which each two task vectors are compared: their number grows with the square
of that of the models."""

Floats = np.ndarray[Any, np.dtype[np.float64]]


def measure(tensor: PlannedTensor, inputs: Sequence[Tensor], merged: Tensor) -> dict[str, Any]:
    """Measure how far models and merge are from the base (or the first model), and how task vectors are related.

    Args:
        tensor: What the plan says of it.
        inputs: The base, if any, and the models: the beginning of the tensor, or all of it.
        merged: The same of the output.

    Returns:
        The number of elements `n`, the norm of the base, and norms of the differences of each model and of the merge
        from it. Where there are a base and several models: `pairs`, see `_pairs`.
    """
    flat = [data.reshape(-1)[:SAMPLE].double() for data in inputs]
    origin, *models = flat
    deltas = [model - origin for model in models]
    found = {
        "n": origin.numel(),
        "norm": float(origin.norm()),
        "models": [float(delta.norm()) for delta in deltas],
        "merged": float((merged.reshape(-1)[:SAMPLE].double() - origin).norm()),
    }
    if _has_pairs(tensor):
        found["pairs"] = _pairs(torch.stack([delta[:PAIR_SAMPLE] for delta in deltas]))
    return found


def measure_bundle(
    tensors: Sequence[PlannedTensor], inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """Measure each tensor of a bundle that is not a copy, by name: in one go where they are small."""
    with np.errstate(invalid="ignore", over="ignore"):  # the record leaves out what is not finite
        return _measure_bundle(tensors, inputs, outputs)


def _measure_bundle(
    tensors: Sequence[PlannedTensor], inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    merged = [i for i, tensor in enumerate(tensors) if not tensor.copy and tensor.size]
    alike = len({(len(inputs[i]), _has_pairs(tensors[i])) for i in merged}) == 1
    if not alike or any(tensors[i].size > PAIR_SAMPLE for i in merged):
        return {tensors[i].name: measure(tensors[i], inputs[i], outputs[i]) for i in merged}
    sizes = [tensors[i].size for i in merged]
    starts = list(accumulate(sizes[:-1], initial=0))
    width = len(inputs[merged[0]])
    origin, *models = (torch.cat([inputs[i][k].reshape(-1) for i in merged]).double().numpy() for k in range(width))
    result = torch.cat([outputs[i].reshape(-1) for i in merged]).double().numpy()
    deltas = [model - origin for model in models]
    norm, change, *each = ([*_norms(values, starts)] for values in (origin, result - origin, *deltas))
    found = {
        tensors[i].name: {"n": size, "norm": norm[k], "models": [norms[k] for norms in each], "merged": change[k]}
        for k, (i, size) in enumerate(zip(merged, sizes, strict=True))
    }
    if _has_pairs(tensors[merged[0]]):
        for i, pairs in zip(merged, _pairs_of_each(deltas, sizes, starts), strict=True):
            found[tensors[i].name]["pairs"] = pairs
    return found


def _has_pairs(tensor: PlannedTensor) -> bool:
    return tensor.base is not None and len(tensor.models) > 1


def _pairs(deltas: Tensor) -> dict[str, Any]:
    """Compare task vectors.

    Args:
        deltas: One row per model, float64.

    Returns:
        The number of elements `n`; `dots`, the inner products of each two, each with itself included; for each two
        different ones, `both`, the number of elements that both changed, and `opposite`, how many of those in opposite
        directions. All in the order of `itertools.combinations`.
    """
    dots = (deltas @ deltas.T).tolist()
    signs = deltas.sign().float()  # sums of so few are exact
    both = signs.abs() @ signs.abs().T
    opposite = (both - signs @ signs.T) / 2
    count = len(deltas)
    two = list(combinations(range(count), 2))
    return {
        "n": deltas.shape[1],
        "dots": [dots[i][j] for i, j in combinations_with_replacement(range(count), 2)],
        "both": [float(both[i, j]) for i, j in two],
        "opposite": [float(opposite[i, j]) for i, j in two],
    }


def _pairs_of_each(deltas: Sequence[Floats], sizes: Sequence[int], starts: Sequence[int]) -> list[Mapping[str, Any]]:
    """Compare the task vectors of each tensor of a bundle; they lie one behind the other."""
    signs = [np.sign(delta).astype(np.float32) for delta in deltas]
    count = len(deltas)
    dots = [np.add.reduceat(deltas[i] * deltas[j], starts) for i, j in combinations_with_replacement(range(count), 2)]
    agree = [signs[i] * signs[j] for i, j in combinations(range(count), 2)]
    both = [np.add.reduceat(np.abs(each), starts) for each in agree]
    opposite = [np.add.reduceat(np.maximum(-each, 0), starts) for each in agree]
    return [
        {
            "n": size,
            "dots": [float(sums[k]) for sums in dots],
            "both": [float(sums[k]) for sums in both],
            "opposite": [float(sums[k]) for sums in opposite],
        }
        for k, size in enumerate(sizes)
    ]


def _norms(values: Floats, starts: Sequence[int]) -> list[float]:
    return np.sqrt(np.add.reduceat(values * values, starts)).tolist()  # type: ignore[no-any-return]
