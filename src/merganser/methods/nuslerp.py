"""NuSLERP: SLERP between two models by weights, or between their task vectors if a base is given."""

import torch
from torch import Tensor

from ..method import PerModel, Weight, merge_method, statistic
from ..ops import along, arc, deltas, gram

# 1 - cos^2 below this is a rounding error of the inner products
_PARALLEL = 1e-14


def ends(base: Tensor | None, models: list[Tensor]) -> list[Tensor]:
    """Return the two ends of the arc."""
    return list(models) if base is None else deltas(base, models)


def factors(products: Tensor, weight: Tensor) -> Tensor:
    """Return the factors of `along`.

    Args:
        products: <first, first>, <first, second>, <second, second>; shape [3, ...], float64.
        weight: Shape [2].
    """
    total = weight.sum()
    known = total.abs() >= 1e-6
    t = torch.where(known, weight[1] / torch.where(known, total, 1.0), 0.5)
    scale = products[0].sqrt() * products[2].sqrt()
    cosine = torch.where(scale > 0, products[1] / torch.where(scale > 0, scale, 1.0), 0.0)
    return arc(cosine, t, straight=1 - cosine * cosine <= _PARALLEL)


def tensor_products(base: Tensor | None, models: list[Tensor]) -> Tensor:
    """Measure the inner products of the whole tensor, shape [3]."""
    return gram(ends(base, models)).view(4)[torch.tensor([0, 1, 3], device=models[0].device)]


def column_products(base: Tensor | None, models: list[Tensor]) -> Tensor:
    """Measure the inner products of every column, shape [3, columns]."""
    first, second = (end.double() for end in ends(base, models))
    return torch.stack([(first * first).sum(0), (first * second).sum(0), (second * second).sum(0)])


def row_products(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner products of every row, shape [3, rows, 1], float64."""
    first, second = first.double(), second.double()
    products = [(first * first).sum(1), (first * second).sum(1), (second * second).sum(1)]
    return torch.stack(products).unsqueeze(2)


def of_columns(measured: Tensor, weight: Tensor, size: Tensor) -> Tensor:
    """Return the factors of every column, shape [3, columns]; of a single row as one vector, shape [3, 1]."""
    return factors(measured.sum(1, keepdim=True) if measured.shape[1] == size else measured, weight)


def by_column(nuslerp_flatten: bool, nuslerp_row_wise: bool) -> bool:
    """Return whether columns are the vectors."""
    return nuslerp_row_wise and not nuslerp_flatten


@merge_method(
    family="spherical",
    cite="shoemake1985slerp",
    scope="row",
    models=(2, 2),
    statistics={
        "whole": statistic(tensor_products, factors, when="nuslerp_flatten"),
        "columns": statistic(column_products, of_columns, when=by_column),
    },
)
def nuslerp(
    base: Tensor | None,
    models: list[Tensor],
    whole: Tensor | None,
    columns: Tensor | None,
    *,
    weight: PerModel[Weight],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Interpolate along the great circle between two models, or between their task vectors.

        t      = weight_2 / (weight_1 + weight_2)
        angle  = arccos(<a, b> / (|a| |b|)),  a, b = the models, or model minus base where a base is given
        merged = base + sin((1 - t) angle) / sin(angle) * a + sin(t angle) / sin(angle) * b

    Use when:
        Two fine-tunes of one base are merged; with the base given, the angle is that between their task vectors.

    Args:
        weight: Share of each model; only the ratio counts.
        nuslerp_flatten: Take the whole tensor as one vector.
        nuslerp_row_wise: Without nuslerp_flatten: take columns (all weights of one input unit) as vectors, despite
            the name; otherwise rows (all weights of one output unit).

    Differs from the paper:
        The paper has unit quaternions; here the vectors keep their own lengths.
        Weights that add up to less than 1e-6 count as equal. Parallel and opposite vectors take the straight line.
        A row of a convolution's weight is all weights of one output unit; mergekit takes the last axis alone.
        A vector of zeros (a task vector of an unchanged tensor) is not refused, as it is by slerp, but counts as being
        at a right angle to the other, as in mergekit: with equal weights, the other keeps 0.71 of its length.
        A tensor of a single row is one vector either way.
    """
    first, second = ends(base, models)
    if nuslerp_flatten:
        given = whole
    elif nuslerp_row_wise:
        given = columns
    else:
        given = factors(row_products(first, second), weight).to(first.dtype)
    assert given is not None
    merged = along(first, second, given)
    return merged if base is None else base + merged
