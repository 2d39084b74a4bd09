"""CABS: the largest elements of every group, without those that an earlier model took."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..method import Number, PerModel, Scale, Weight, default, merge_method
from ..ops import by_rank, deltas

Kept = Annotated[int, Number(1, search=(1, 4))]
Group = Annotated[int, Number(1, search=(4, 16))]


def check_kept(parameters: Mapping[str, Any]) -> str | None:
    """Return a complaint if n exceeds m, else None."""
    n, m = parameters["n"], parameters["m"]
    return f"n must be at most m, {m}, got {n}" if n > m else None


def largest(groups: Tensor, count: int) -> Tensor:
    """Return which entries of each row are the largest, bool; of equal entries the last are taken.

    Args:
        groups: Non-negative, shape [groups, columns].
        count: Number of entries taken of each row.
    """
    columns = groups.shape[1]
    return by_rank(groups, torch.arange(columns, device=groups.device) >= columns - count)


def largest_of_groups(size: Tensor, n: int, m: int, tail: str) -> Tensor:
    """Return which entries are among the n largest of their group of m neighbours in a row, bool.

    Args:
        size: Non-negative, shape [rows, columns].
        n: Number of entries taken of each group.
        m: Size of the groups.
        tail: As in `cabs`.
    """
    rows, columns = size.shape
    rest = columns % m
    parts = []
    if columns >= m:
        parts.append(largest(size[:, : columns - rest].reshape(-1, m), n).view(rows, -1))
    if rest:
        # the shorter group at the end of a row: its share of n, rounded up
        parts.append(largest(size[:, columns - rest :].contiguous(), -(-n * rest // m) if tail == "share" else 0))
    return torch.cat(parts, dim=1)


@merge_method(
    family="task vectors",
    cite="yang2025cabs",
    scope="row",
    validate=check_kept,
    breaks={
        "identical": "most elements are dropped",
        "order": "what an earlier model took is gone",
    },
)
def cabs(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    n: Kept = 64,
    m: Group = 256,
    tail: Literal["share", "drop"] = "share",
) -> Tensor:
    """Add the task vectors; each contributes, of every m neighbours, the n largest that no earlier model took.

        free_i = delta_i where no model before i has an element, else 0
        kept_i = free_i where |free_i| is among the n largest of its group, else 0
        merged = base + lambda * sum_i weight_i * kept_i

    Groups are m consecutive elements of a row (all weights of one output unit). Models take their elements in the
    order of the recipe, so that the first one is not limited by the others.

    Use when:
        Fine-tunes of different tasks interfere, and one of them should be preserved best. Name that one first.

    Args:
        weight: Factor of each task vector. The authors take 1.2 for two 7B models, and search 0.4 to 1 for small ones.
        lambda_: Factor of their sum.
        n: Number of elements that each model may take of a group.
        m: Size of a group. If n times the number of models exceeds m, later models take fewer elements.
        tail: What happens at the end of a row that is shorter than a group: its share of elements is kept (rounded up),
            or none, as in the authors' script for small models.

    Differs from the paper:
        Groups end with the row; the authors' code treats the tensor as one row, which is the same if m divides the
        length of the rows.
        Of equal elements the last ones are taken. Elements that did not change are not taken.
        If n is m / 2 or more, the authors' script for 7B also gives the second model elements that the first one took;
        at m / 2 it does not prune the second model at all. Here models never overlap.
    """
    taken = torch.zeros_like(base, dtype=torch.bool)
    total = torch.zeros_like(base)
    for i, vector in enumerate(deltas(base, models)):
        free = torch.where(taken, torch.zeros_like(vector), vector)
        kept = largest_of_groups(free.abs(), n, m, tail) & (free != 0)
        total = torch.where(kept, free * weight[i], total)
        taken = taken | kept
    return base + lambda_ * total
