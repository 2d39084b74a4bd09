"""Measure for the run record on the first elements of each tensor, while they are in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from ...ops.linalg.rounding import rounding_norms
from ..plan.tensor import PlannedTensor

SAMPLE = 1 << 16
"""Elements at the start of each tensor on which distances are measured."""

PAIR_SAMPLE = 1 << 14
"""Elements at the start of each tensor on which pairs of task vectors are compared; fewer, as the number of pairs grows
with the square of the number of models."""

_TOGETHER = 1 << 17
"""Elements of several small tensors that are measured at a time; in float64 for all models these are megabytes."""


def measure_samples(
    tensors: Sequence[PlannedTensor], inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """Measure the distance of models and merge from the base (or first model), and how task vectors are related.

    Args:
        tensors: The planned tensors; copied ones are left out.
        inputs: For each tensor, the base, if any, and the models: the start of the tensor, or all of it.
        outputs: For each tensor, the start of the merged tensor, or all of it.

    Returns:
        By tensor name: `n`, the number of elements; `norm` of the base; `models` and `merged`, the norms of their
        differences from it. With a base also `rounding`, the expected norm of each model's rounding errors (0 if it
        equals the base), and, with several models, `pairs` as from `_pairs`.
    """
    # measure tensors of one size together
    groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if not tensor.copy and tensor.size:
            groups[min(outputs[i].numel(), SAMPLE), len(inputs[i]), tensor.base is not None].append(i)
    found = {}
    parts = [(key, part) for key, members in groups.items() for part in _parts(members, _TOGETHER // key[0] or 1)]
    for (size, width, with_base), members in parts:
        # slice only where needed: slicing very many small tensors takes time
        first = [
            [data if data.shape == (size,) else data.reshape(-1)[:size] for data in (*inputs[i], outputs[i])]
            for i in members
        ]
        origin = torch.stack([own[0] for own in first]).double()
        deltas = origin.new_empty(len(members), width, size)
        rounding = []
        for k in range(width):
            stored = torch.stack([own[k + 1] for own in first])
            torch.sub(stored, origin, out=deltas[:, k])
            if with_base and k < width - 1:
                # fewer elements suffice to estimate a mean of squares
                few = stored[:, :PAIR_SAMPLE]
                norms = rounding_norms(few)
                for row, i in enumerate(members):
                    noise = tensors[i].inputs[k + 1].noise
                    if noise is not None:
                        norms[row] = noise(few[row]).sum().sqrt()
                rounding.append(norms * (size / few.shape[1]) ** 0.5)
        norm, change = origin.norm(dim=1).tolist(), deltas.norm(dim=2).tolist()
        pairs = _pairs(deltas[:, :-1, :PAIR_SAMPLE]) if with_base and width > 2 else None
        for k, i in enumerate(members):
            *models, merged = change[k]
            found[tensors[i].name] = {"n": size, "norm": norm[k], "models": models, "merged": merged}
            if with_base:
                expected = zip(rounding, models, strict=True)
                found[tensors[i].name]["rounding"] = [float(norms[k]) if moved else 0.0 for norms, moved in expected]
            if pairs is not None:
                found[tensors[i].name]["pairs"] = pairs[k]
    return found


def _parts(members: Sequence[int], count: int) -> list[Sequence[int]]:
    return [members[i : i + count] for i in range(0, len(members), count)]


def _pairs(deltas: Tensor) -> list[dict[str, Any]]:
    """Compare the task vectors of several tensors.

    Args:
        deltas: Shape [tensors, models, elements], float64.

    Returns:
        For each tensor: `n`, the number of elements; `dots`, the inner product of every pair, also of each task vector
        with itself; and per pair of different ones `both`, the number of elements that both changed, and `opposite`,
        how many of these with opposite signs. Pairs are in the order of `itertools.combinations` (`_with_replacement`).
    """
    count, size = deltas.shape[1:]
    own, other = zip(*combinations_with_replacement(range(count), 2), strict=True)
    one, two = zip(*combinations(range(count), 2), strict=True)
    signs = deltas.sign().float()  # float32 counts PAIR_SAMPLE elements exactly
    changed = signs.abs()
    both = (changed @ changed.mT)[:, one, two]
    opposite = (both - (signs @ signs.mT)[:, one, two]) / 2
    columns = ((deltas @ deltas.mT)[:, own, other], both, opposite)
    return [
        {"n": size, "dots": dots, "both": together, "opposite": against}
        for dots, together, against in zip(*(column.tolist() for column in columns), strict=True)
    ]
