"""LoRA-LEGO: adapters taken apart into ranks, which are clustered and put together again."""

import torch
from torch import Tensor

from ..method import PerModel, Scale, Weight, default
from ..method.declare import factor_method
from ..method.factors import Factors
from ..ops.random import Random

_ROUNDS = 100


def units(model: Factors, weight: Tensor) -> Tensor:
    """Return the ranks of an adapter as rows [a_j, b_j], in a form that does not depend on how it is factored.

    Of each rank's product, a and b get the same norm, and the largest entry of a is positive.
    """
    a, b = model.a.double(), (model.b.double() * model.scale * weight.double()).T
    lengths = a.norm(dim=1) * b.norm(dim=1)
    root = lengths.sqrt().unsqueeze(1)
    a = torch.nn.functional.normalize(a, dim=1) * root
    b = torch.nn.functional.normalize(b, dim=1) * root
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return torch.cat([a * sign, b * sign], dim=1)


def clusters(points: Tensor, count: int, draws: Tensor) -> Tensor:
    """Return the cluster of each point by k-means, with k-means++ to begin with.

    Args:
        points: Shape [n, d], float64.
        count: Number of clusters, at most n.
        draws: Random numbers in [0, 1), one per cluster.
    """
    gram = points @ points.T
    squares = gram.diagonal()
    between = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * gram).clamp(min=0)
    chosen = [int(float(draws[0]) * len(points))]
    for draw in draws[1:count]:
        nearest = between[chosen].min(0).values
        nearest[chosen] = 0
        if nearest.sum() == 0:
            chosen.append(next(i for i in range(len(points)) if i not in chosen))
            continue
        steps = nearest.cumsum(0)
        chosen.append(min(int(torch.searchsorted(steps, draw.double() * steps[-1], right=True)), len(points) - 1))
    labels = between[chosen].argmin(0)
    for _ in range(_ROUNDS):
        member = torch.nn.functional.one_hot(labels, count).double()
        sizes = member.sum(0)
        mean = member / sizes.clamp(min=1)
        # distances to means, from the Gram matrix alone
        to_mean = squares.unsqueeze(1) - 2 * gram @ mean + ((mean.T @ gram) * mean.T).sum(1)
        to_mean[:, sizes == 0] = torch.inf
        found = to_mean.argmin(1)
        if torch.equal(found, labels):
            break
        labels = found
    return labels


@factor_method(cite="zhao2025loralego")
def lora_lego(
    models: list[Factors],
    rng: Random,
    rank: int | None,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    reweight: bool = True,
) -> Factors:
    """Cluster the ranks of all adapters, and make one rank of each cluster.

        units    [a_ij, b_ij] of every adapter i and rank j, scale and weight included, balanced
        clusters k of all units, by k-means (k: the rank of the recipe, else the largest of the adapters)
        a_c, b_c the mean of a cluster's units, brought back to their mean norm
        merged   lambda * sqrt(R / k) * sum_c b_c a_c,   R the mean rank of the adapters

    Use when:
        Adapters of different tasks, perhaps of different ranks, are merged into one of a given rank.

    Args:
        weight: Factor of each adapter's change.
        lambda_: Factor of the merged change.
        reweight: Bring each mean back to the mean norm of its cluster's units.

    Differs from the paper:
        Units are balanced, and their signs fixed, before they are clustered, so that the result does not depend on how
        an adapter is factored. No authors' code was found; the scales are those of the paper's text.
    """
    every = torch.cat([units(model, weight[i]) for i, model in enumerate(models)])
    count = min(rank or max(model.rank for model in models), len(every))
    labels = clusters(every, count, rng.uniform(0, (count,)))
    member = torch.nn.functional.one_hot(labels, count).double()
    sizes = member.sum(0).clamp(min=1).unsqueeze(1)
    mean = member.T @ every / sizes
    if reweight:
        wanted = member.T @ every.norm(dim=1, keepdim=True) / sizes
        mean = torch.nn.functional.normalize(mean, dim=1) * wanted
    inputs = models[0].a.shape[1]
    average = sum(model.rank for model in models) / len(models)
    factor = float(lambda_) * (average / count) ** 0.5
    return Factors(mean[:, :inputs].float(), (mean[:, inputs:].T * factor).float())
