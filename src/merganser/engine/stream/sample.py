"""What the run record tells of each tensor, measured on its first elements while they are at hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from ...ops.rounding import rounding_norms
from ..plan.tensor import PlannedTensor

SAMPLE = 1 << 16
"""Elements at the start of each tensor on which distances are measured."""

PAIR_SAMPLE = 1 << 14
"""Elements at the start of each tensor on which each two task vectors are compared: their number grows with the square
of that of the models."""

_TOGETHER = 1 << 17
"""Elements, of several tensors, that are measured at a time: in float64 and of all models they are megabytes."""


def measure_samples(
    tensors: Sequence[PlannedTensor], inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """Measure how far models and merge are from the base (or the first model), and how task vectors are related.

    Args:
        tensors: What the plan says of each; copies are left out.
        inputs: For each the base, if any, and the models: the beginning of the tensor, or all of it.
        outputs: The same of the output.

    Returns:
        By name the number of elements `n`, the norm of the base, and norms of the differences of each model and of the
        merge from it. Where there is a base: `rounding`, the norm that the rounding of each model's stored values is
        expected to have (0 where nothing changed); with several models `pairs`, see `_pairs`.
    """
    # tensors of one size are measured together
    groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if not tensor.copy and tensor.size:
            groups[min(outputs[i].numel(), SAMPLE), len(inputs[i]), tensor.base is not None].append(i)
    found = {}
    parts = [(key, part) for key, members in groups.items() for part in _parts(members, _TOGETHER // key[0] or 1)]
    for (size, width, with_base), members in parts:
        # slices of very many small tensors cost
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
                # fewer elements are enough for a mean of squares
                few = stored[:, :PAIR_SAMPLE]
                rounding.append(rounding_norms(few) * (size / few.shape[1]) ** 0.5)
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
        For each tensor the number of elements `n`; `dots`, the inner products of each two, each with itself included;
        for each two different ones, `both`, the number of elements that both changed, and `opposite`, how many of those
        in opposite directions. All in the order of `itertools.combinations`.
    """
    count, size = deltas.shape[1:]
    own, other = zip(*combinations_with_replacement(range(count), 2), strict=True)
    one, two = zip(*combinations(range(count), 2), strict=True)
    signs = deltas.sign().float()  # sums of so few are exact
    changed = signs.abs()
    both = (changed @ changed.mT)[:, one, two]
    opposite = (both - (signs @ signs.mT)[:, one, two]) / 2
    columns = ((deltas @ deltas.mT)[:, own, other], both, opposite)
    return [
        {"n": size, "dots": dots, "both": together, "opposite": against}
        for dots, together, against in zip(*(column.tolist() for column in columns), strict=True)
    ]
