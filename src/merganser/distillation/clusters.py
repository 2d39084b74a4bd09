"""k-means on directions, from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k_means"]

_ROUNDS = 100


def k_means(points: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Divide points into clusters by the directions from their mean.

    The first centres are drawn far from each other (k-means++). A cluster that loses all its points gets the one that is
    farthest from its centre, so that none is empty.

    Args:
        points: Shape [points, width]; at least as many as clusters.
        clusters: Number of clusters.
        seed: Seed of the draw.

    Returns:
        The cluster of each point, int64, shape [points]; numbered in the order of their first points.
    """
    points = points.double() - points.double().mean(0)
    points = points / points.norm(dim=1, keepdim=True).clamp(min=1e-30)
    centres = _spread(points, clusters, torch.Generator().manual_seed(seed))
    found = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        distances = torch.cdist(points, centres)
        nearest = _without_empty(distances.argmin(1), distances, clusters)
        if torch.equal(nearest, found):
            break
        found = nearest
        sums = points.new_zeros(centres.shape).index_add(0, found, points)
        centres = sums / torch.bincount(found, minlength=clusters)[:, None]
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(own, len(numbers)) for own in found.tolist()])


def _spread(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(clusters - 1):
        squares = torch.cdist(points, points[chosen]).amin(1).square()
        squares[chosen] = 0
        if not bool(squares.any()):
            # all other points are equal to chosen ones
            squares = torch.ones(len(points), dtype=torch.float64)
            squares[chosen] = 0
        chosen.append(int(torch.multinomial(squares, 1, generator=generator)))
    return points[chosen]


def _without_empty(nearest: Tensor, distances: Tensor, clusters: int) -> Tensor:
    counts = torch.bincount(nearest, minlength=clusters)
    own = distances.gather(1, nearest[:, None])[:, 0]
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        movable = torch.where(counts[nearest] > 1, own, -1.0)
        point = int(movable.argmax())
        counts[nearest[point]] -= 1
        nearest[point], own[point] = empty, 0.0
        counts[empty] = 1
    return nearest
