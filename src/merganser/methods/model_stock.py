"""Model Stock: interpolate between the base and the average, by the angle between the task vectors."""

import torch
from torch import Tensor

from ..method import NonNegative, default, merge_method, statistic
from ..ops import deltas, gram


def ratio(products: Tensor, clamp: bool, norm_floor: Tensor) -> Tensor:
    """Return the interpolation ratio t.

    Args:
        products: Inner products of the task vectors, shape [T, T, ...], float64.
        clamp: Keep the ratio between 0 and 1.
        norm_floor: Lower limit of |delta_i| |delta_j|.
    """
    n = products.shape[0]
    norms = [products[i, i].sqrt() for i in range(n)]
    total = torch.zeros_like(products[0, 0])
    for i in range(n):
        for j in range(i + 1, n):
            scale = (norms[i] * norms[j]).clamp(min=norm_floor)
            known = scale > 0
            cosine = torch.where(known, products[i, j] / torch.where(known, scale, 1.0), 0.0)
            total = total + cosine.clamp(-1, 1)
    cosine = total / (n * (n - 1) / 2)
    below = 1 + (n - 1) * cosine
    known = below.abs() >= 1e-6
    t = torch.where(known, n * cosine / torch.where(known, below, 1.0), 0.0)
    return t.clamp(0, 1) if clamp else t


def inner_products(base: Tensor, models: list[Tensor]) -> Tensor:
    """Measure the inner products of the task vectors, shape [T, T]."""
    return gram(deltas(base, models))


def row_products(vectors: list[Tensor]) -> Tensor:
    """Return the inner products of every row, shape [T, T, rows, 1], float64."""
    n = len(vectors)
    upper = {
        (i, j): (vectors[i].double() * vectors[j].double()).sum(1, keepdim=True) for i in range(n) for j in range(i, n)
    }
    return torch.stack([torch.stack([upper[min(i, j), max(i, j)] for j in range(n)]) for i in range(n)])


def of_tensor(filter_wise: bool) -> bool:
    """Return whether the angle is that of the whole tensor."""
    return not filter_wise


@merge_method(
    family="averages",
    cite="jang2024modelstock",
    scope="row",
    models=(2, None),
    statistics={"t": statistic(inner_products, ratio, when=of_tensor)},
    mergekit={"norm_floor": 1e-6},
)
def model_stock(
    base: Tensor,
    models: list[Tensor],
    t: Tensor | None,
    *,
    filter_wise: bool = False,
    clamp: bool = False,
    norm_floor: NonNegative = default(0.0),
) -> Tensor:
    """Interpolate between the base and the average of the models, by the angle between their task vectors.

        cos    = mean over pairs i < j of <delta_i, delta_j> / (|delta_i| |delta_j|),   delta_i = model_i - base
        t      = N cos / (1 + (N - 1) cos)
        merged = base + t * mean_i delta_i

    Use when:
        The models are fine-tunes of one base on the same data with different seeds or settings. It is not made for
        experts of different tasks: task vectors at right angles to each other give t = 0, the base itself.

    Args:
        filter_wise: Use the angle of every row (all weights of one output unit), instead of that of the whole tensor.
        clamp: Keep t between 0 and 1; without it a mean angle above 90 degrees gives a t below 0.
        norm_floor: Lower limit of |delta_i| |delta_j|; it moves tensors that hardly changed towards the base.

    Differs from the paper:
        The paper has one angle for all pairs; here it is the mean of the pairs' cosines.
        Where 1 + (N - 1) cos is below 1e-6, t is 0. A task vector of zeros has a cosine of 0 with the others.
        mergekit has a `norm_floor` of 1e-6; a row of a convolution's weight is its last axis there.
    """
    task_vectors = deltas(base, models)
    total = task_vectors[0]
    for vector in task_vectors[1:]:
        total = total + vector
    if t is None:
        t = ratio(row_products(task_vectors), clamp, norm_floor).to(total.dtype)
    return base + total * (t / len(models))
