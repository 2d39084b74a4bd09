"""CABS: of every few elements the largest, and none that an earlier model took."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..method import Number, PerModel, Scale, Weight, default, merge_method
from ..ops import by_rank, deltas

Kept = Annotated[int, Number(1, search=(1, 4))]
Group = Annotated[int, Number(1, search=(4, 16))]


def check_kept(parameters: Mapping[str, Any]) -> str | None:
    """Complain where more elements of a group are to be kept than it has."""
    n, m = parameters["n"], parameters["m"]
    return f"n must be at most m, {m}, got {n}" if n > m else None


def largest(groups: Tensor, count: int) -> Tensor:
    """Say which entries of each row are the largest, bool; of equal ones the last count.

    Args:
        groups: Not negative, shape [groups, columns].
        count: How many of each row.
    """
    columns = groups.shape[1]
    return by_rank(groups, torch.arange(columns, device=groups.device) >= columns - count)


def largest_of_groups(size: Tensor, n: int, m: int, tail: str) -> Tensor:
    """Say which entries are the n largest of their group of m neighbours in a row, bool.

    Args:
        size: Not negative, shape [rows, columns].
        n: How many of each group.
        m: Size of the groups.
        tail: As in `cabs`.
    """
    rows, columns = size.shape
    rest = columns % m
    parts = []
    if columns >= m:
        parts.append(largest(size[:, : columns - rest].reshape(-1, m), n).view(rows, -1))
    if rest:
        # rounded up
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
    """Add the task vectors, each with the n largest of every m neighbours that no model before it took.

        free_i = delta_i where no model before i has an element, else 0
        kept_i = free_i where |free_i| is among the n largest of its group, else 0
        merged = base + lambda * sum_i weight_i * kept_i

    Groups are m elements in a row (all weights of one output unit), one after the other. Models are taken in the order
    of the recipe: the one named first takes what it likes.

    Use when:
        Fine-tunes of different tasks get in each other's way, and one of them is to come through unharmed. Name the
        best one first.

    Args:
        weight: Factor of each task vector. The authors take 1.2 for two models of 7B, and search 0.4 to 1 for small ones.
        lambda_: Factor of their sum.
        n: How many elements of a group each model may take.
        m: Size of a group. With n times the number of models above m, later models find less.
        tail: What becomes of a row's end that is shorter than a group: its share of elements is kept (rounded up), or
            none, as in the authors' script for small models.

    Differs from the paper:
        Groups end with the row; the authors' code takes the tensor for one row, which is the same where m divides the
        length of the rows.
        Of equal elements the last ones are taken. Elements that did not change are not taken.
        The authors' script for 7B gives the second model what the first one took, too, if n is m / 2 or more; at m / 2 it
        does not prune the second model at all. Here models never overlap.
    """
    taken = torch.zeros_like(base, dtype=torch.bool)
    total = torch.zeros_like(base)
    for i, vector in enumerate(deltas(base, models)):
        free = torch.where(taken, torch.zeros_like(vector), vector)
        kept = largest_of_groups(free.abs(), n, m, tail) & (free != 0)
        total = torch.where(kept, free * weight[i], total)
        taken = taken | kept
    return base + lambda_ * total
