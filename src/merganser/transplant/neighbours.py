"""A vector as a combination of its nearest neighbours among the rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["barycentric", "focus", "interpolate", "nearest", "sparsemax", "wechsel"]

_BATCH = 1024
_TEMPERATURE = 0.1
"""Of WECHSEL's softmax over cosines."""

Pairs = tuple[Tensor, Tensor]


def nearest(targets: Tensor, rows: Tensor, k: int, *, cosine: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield, for a batch of vectors at a time, the indices of their k nearest rows and how near these are.

    Args:
        targets: The vectors, float32, shape [n, d].
        rows: The rows, float32, shape [v, d].
        k: Number of neighbours.
        cosine: Whether to yield cosines, the largest first, or Euclidean distances, the smallest first.
    """
    norms = rows.norm(dim=1)
    for start in range(0, len(targets), _BATCH):
        part = slice(start, start + _BATCH)
        products = targets[part] @ rows.T
        own = targets[part].norm(dim=1, keepdim=True)
        if cosine:
            score = products / (own * norms).clamp_min(torch.finfo(torch.float32).tiny)
            values, indices = score.topk(min(k, len(rows)), dim=1)
            yield part, indices, values.double()
        else:
            _, indices = (norms**2 - 2 * products).topk(min(k, len(rows)), dim=1, largest=False)
            # products of close vectors cancel, so distances are computed from differences
            yield part, indices, (rows[indices].double() - targets[part].double()[:, None]).norm(dim=2)


def _gather(
    targets: Tensor, rows: Tensor, k: int, weigh: Callable[[slice, Tensor, Tensor], Tensor], *, cosine: bool
) -> Pairs:
    k = min(k, len(rows))
    indices = torch.zeros(len(targets), k, dtype=torch.int64)
    weights = torch.zeros(len(targets), k, dtype=torch.float64)
    for part, found, near in nearest(targets, rows, k, cosine=cosine):
        indices[part], weights[part] = found, weigh(part, found, near)
    return indices, weights


def interpolate(targets: Tensor, rows: Tensor, k: int) -> Pairs:
    """Average the k nearest rows, each weighted by the inverse of its distance; weights sum to 1.

    A row at distance 0 gets all the weight.
    """

    def weigh(_part: slice, _indices: Tensor, distance: Tensor) -> Tensor:
        exact = (distance == 0).double()
        inverse = torch.where(exact.any(1, keepdim=True), exact, 1 / distance)
        return inverse / inverse.sum(1, keepdim=True)

    return _gather(targets, rows, k, weigh, cosine=False)


def barycentric(targets: Tensor, rows: Tensor, k: int) -> Pairs:
    """Combine the k nearest rows with the weights of sum 1 that come nearest to the vector (least squares)."""

    def weigh(part: slice, indices: Tensor, _distance: Tensor) -> Tensor:
        # with weights of sum 1, the rest is the combination of the differences
        difference = rows[indices].double() - targets[part].double()[:, None]
        gram = difference @ difference.mT
        # a small multiple of the identity, as locally linear embedding adds where neighbours are dependent
        scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        ridge = 1e-9 * scale[:, None, None] * torch.eye(gram.shape[1], dtype=torch.float64)
        solved = torch.linalg.solve(gram + ridge, torch.ones(*gram.shape[:2], dtype=torch.float64))
        weights: Tensor = solved / solved.sum(1, keepdim=True)
        return weights

    return _gather(targets, rows, k, weigh, cosine=False)


def wechsel(targets: Tensor, rows: Tensor, k: int) -> Pairs:
    """Average the k rows of largest cosine, weighted by a softmax of the cosines at temperature 0.1.

    Minixhofer, Paischer and Rekabsaz, "WECHSEL", 2022.
    """
    return _gather(targets, rows, k, lambda _p, _i, cosine: (cosine / _TEMPERATURE).softmax(1), cosine=True)


def focus(targets: Tensor, rows: Tensor, k: int) -> Pairs:
    """Average the k rows of largest cosine, weighted by the sparsemax of the cosines.

    Dobler and de Melo, "FOCUS", 2023. The weights of rows behind the k-th are zero unless more than k rows count.
    """
    return _gather(targets, rows, k, lambda _p, _i, cosine: sparsemax(cosine), cosine=True)


def sparsemax(scores: Tensor) -> Tensor:
    """Project each row of scores on the probability simplex (Martins and Astudillo, 2016).

    Args:
        scores: Shape [n, k], each row in descending order.
    """
    size = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype)
    above = scores.cumsum(1) - 1
    support = (size * scores > above).sum(1, keepdim=True)
    threshold = above.gather(1, support - 1) / support
    return (scores - threshold).clamp_min(0)
