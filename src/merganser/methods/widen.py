"""WIDEN: weigh every column by how much its norm and its direction changed."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from ..method import Location, NonNegative, Number, default, merge_method
from ..ops import by_rank, deltas

Ratio = Annotated[Tensor, Number(0.0, search=(0.5, 1.5))]

# number of elements whose products are in memory at a time
_CHUNK = 1 << 20


def by_row(location: Location, tokens: str) -> float:
    """Return 1 if rows are the units that are weighted, 0 if columns are."""
    tables = {"none": (), "embedding": ("embedding",), "both": ("embedding", "head")}[tokens]
    return float(location.role in tables)


def packed(location: Location) -> float:
    """Return 1 if a 3-D tensor is a pack of matrices (experts), else 0."""
    return float(location.role == "expert")


def products(first: Tensor, second: Tensor, rows: bool) -> Tensor:
    """Return the inner products of corresponding rows or columns of two matrices, float64, shape [units]."""
    step = max(_CHUNK // max(first.shape[1], 1), 1)
    parts = zip(torch.split(first, step), torch.split(second, step), strict=True)
    sums = [(a.double() * b.double()).sum(dim=1 if rows else 0) for a, b in parts]
    return torch.cat(sums) if rows else torch.stack(sums).sum(dim=0)


def divergences(base: Tensor, model: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """Return how much the norm and the direction of each unit changed, float64, shape [units].

    Both are computed from the task vector, because differences of nearly equal norms, and 1 minus cosines near 1, would
    be mostly rounding error.
    """
    vector = model - base
    start, end = products(base, base, rows).sqrt(), products(model, model, rows).sqrt()
    square = products(vector, vector, rows)
    total, area = start + end, 2 * start * end
    growth = (2 * products(base, vector, rows) + square) / torch.where(total > 0, total, 1.0)
    turn = (square - growth * growth).clamp(min=0) / torch.where(area > 0, area, 1.0)
    # a unit of zeros has no direction: its turn is 0 if it stayed zero, else 1
    return growth.abs(), torch.where(area > 0, turn, (total > 0).double())


def scores(significance: Tensor, ratio: Tensor, score: Tensor) -> Tensor:
    """Return `score` where a model's significance is above its average times `ratio`, else the softmax over models.

    Args:
        significance: Shape [T, units].
        ratio: Factor of the average.
        score: The score.
    """
    above = significance > significance.mean(dim=1, keepdim=True) * ratio
    return torch.where(above, score, torch.softmax(significance, dim=0))


def unit_shares(base: Tensor, models: list[Tensor], ratio: Tensor, score: Tensor, rows: bool) -> Tensor:
    """Return each model's factor for each row or column of a matrix, shape [T, units], float64."""
    moved = [divergences(base, model, rows) for model in models]
    n = base.shape[0 if rows else 1]
    table = torch.arange(n, dtype=torch.float64, device=base.device) / n
    ranks = [by_rank(torch.stack(part), table) for part in zip(*moved, strict=True)]
    return 0.5 * (scores(ranks[0], ratio, score) + scores(ranks[1], ratio, score))


def add(base: Tensor, models: list[Tensor], share: Tensor, normalize: bool) -> Tensor:
    """Add the task vectors, each multiplied by its share.

    Args:
        base: The base.
        models: The models.
        share: Factor of each model, shape [T, ...], broadcastable to the shape of the base.
        normalize: Divide by the sum of the shares.
    """
    if normalize:
        whole = share.sum(dim=0)
        share = share / torch.where(whole > 0, whole, 1.0)
    share = share.to(base.dtype)
    total = torch.zeros_like(base)
    for own, vector in zip(share, deltas(base, models), strict=True):
        total = total + own * vector
    return base + total


@merge_method(
    family="task vectors",
    cite="yu2024widen",
    scope="tensor",
    located={"by_row": by_row, "packed": packed},
    breaks={"identical": "the factors of the models do not add up to 1"},
)
def widen(
    base: Tensor,
    models: list[Tensor],
    by_row: Tensor,
    packed: Tensor,
    *,
    ratio: Ratio = default(1.0),
    score: NonNegative = default(1.0),
    normalize: bool = False,
    tokens: Literal["none", "embedding", "both"] = "embedding",
) -> Tensor:
    """Add the task vectors, each column by how far its length and its direction moved among those of its model.

        m_ij   = | |model_ij| - |base_j| |, d_ij = 1 - cos(model_ij, base_j)          (column j of model i)
        r_ij   = (rank of m_ij in model i, from 0) / columns, and so for d
        s_ij   = score where r_ij > ratio * mean_j r_ij, else softmax_i(r_ij); and so for d
        merged = base_j + sum_i (s_ij of m + s_ij of d) / 2 * (model_ij - base_j)

    Vectors are treated element by element, with |delta| in place of the ranks.

    Use when:
        Two or three models are merged of which one moved far from the base, by continued pre-training, and others
        little. With more, set `normalize`: without it, as published, the factors of a column can add up to the number of
        models.

    Args:
        ratio: A column matters if its rank is above the model's average rank times this. The larger, the fewer matter.
        score: Factor of a column that matters.
        normalize: Divide by the sum of the factors. As published, a column that matters to all models is added in full
            for each of them.
        tokens: Matrices whose rows (tokens) are weighted instead of their columns: none, the embeddings as published, or
            the head, too.

    Differs from the paper:
        Of equal changes the first column has the lower rank.
        A column of zeros (an unused token) has no direction, and the code divides 0 by 0; here its d is 0 if it stayed
        zero, else 1.
        Convolutions are matrices, a row being all weights of one output unit; packed experts are treated one by one.
        A head that shares the embedding is treated as that.
    """
    if base.dim() < 2:
        significance = torch.stack([vector.double().abs().reshape(-1) for vector in deltas(base, models)])
        share = scores(significance, ratio, score).view(len(models), *base.shape)
        return add(base, models, share, normalize)
    rows = bool(by_row > 0) and base.dim() == 2
    pack = bool(packed > 0) and base.dim() == 3
    matrices = base if pack else base.reshape(1, base.shape[0], -1)
    inputs = [model.view_as(matrices) for model in models]
    merged = torch.empty_like(matrices)
    for i, matrix in enumerate(matrices):
        own = [model[i] for model in inputs]
        share = unit_shares(matrix, own, ratio, score, rows)
        merged[i] = add(matrix, own, share.unsqueeze(2) if rows else share.unsqueeze(1), normalize)
    return merged.view_as(base)
