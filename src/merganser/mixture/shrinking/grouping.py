"""Divide experts into groups."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Groups", "by_centres", "by_linkage", "by_means", "highest"]

Groups = list[list[int]]
"""The members of each group, its centre first; groups are in the order of their centres."""


def highest(scores: Tensor, count: int) -> list[int]:
    """Return the experts with the highest scores, in the order of their numbers; of equals, the first."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def by_centres(similarity: Tensor, centres: list[int], most: int | None = None) -> Groups:
    """Let every other expert join its most similar centre.

    Args:
        similarity: Shape [experts, experts].
        centres: The centres, in ascending order.
        most: Largest size of a group; the most similar pairs come first. None for any size.
    """
    groups = {centre: [centre] for centre in centres}
    others = [expert for expert in range(len(similarity)) if expert not in groups]
    pairs = sorted((-float(similarity[expert, centre]), expert, centre) for expert in others for centre in centres)
    placed: set[int] = set()
    for _, expert, centre in pairs:
        if expert not in placed and (most is None or len(groups[centre]) < most):
            placed.add(expert)
            groups[centre].append(expert)
    return [[centre, *sorted(groups[centre][1:])] for centre in centres]


def by_linkage(points: Tensor, count: int) -> Groups:
    """Cluster agglomeratively: Euclidean distances, average linkage; of equal distances, the first pair.

    Args:
        points: A point per expert, float64, shape [experts, width].
        count: Number of groups.
    """
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    groups: dict[int, list[int]] = {expert: [expert] for expert in range(len(points))}
    while len(groups) > count:
        one, two = divmod(int(distances.argmin()), len(points))
        one, two = min(one, two), max(one, two)
        sizes = len(groups[one]), len(groups[two])
        # the mean distance to the members of both
        mean = (sizes[0] * distances[one] + sizes[1] * distances[two]) / sum(sizes)
        distances[one], distances[:, one] = mean, mean
        distances[one, one] = torch.inf
        distances[two], distances[:, two] = torch.inf, torch.inf
        groups[one] += groups.pop(two)
    return [sorted(members) for members in groups.values()]


def by_means(kernel: Tensor, count: int, first: int) -> Groups:
    """Cluster by k-means in the space of a kernel, begun at the experts that are farthest from each other.

    k-means++ draws its start at random, the farther the likelier; here it is the farthest, so that no seed matters.

    Args:
        kernel: Inner products of the experts' points, float64, shape [experts, experts].
        count: Number of groups.
        first: The expert to begin with.
    """
    squares = kernel.diagonal()
    centres = [first]
    while len(centres) < count:
        away = (squares[:, None] - 2 * kernel[:, centres] + squares[centres]).min(1).values
        away[centres] = -1.0
        centres.append(int(away.argmax()))
    centres.sort()
    distances = squares[:, None] - 2 * kernel[:, centres] + squares[centres]
    labels = distances.argmin(1)
    labels[centres] = torch.arange(count)
    for _ in range(100):
        one_hot = torch.nn.functional.one_hot(labels, count).double()
        means = one_hot / one_hot.sum(0)
        inner = kernel @ means
        distances = squares[:, None] - 2 * inner + (means * inner).sum(0)
        moved = distances.argmin(1)
        # stop before a group would be empty
        if torch.equal(moved, labels) or bool((torch.bincount(moved, minlength=count) == 0).any()):
            break
        labels = moved
    groups = [torch.nonzero(labels == group).flatten().tolist() for group in range(count)]
    return sorted(groups)
