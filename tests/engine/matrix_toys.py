"""Methods that work on matrices, of the simplest kind."""

from __future__ import annotations

import torch
from torch import Tensor

from merganser.method import Embeddings, Others, PerModel, Scale, Weight, default, merge_method, statistic


@merge_method(family="toys", cite="-", scope="matrix", breaks={"identical": "only rank 1 is kept"})
def rank_one(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the largest singular component of the weighted sum of the task vectors.

        merged = base + lambda * s_1 u_1 v_1^T

    Use when:
        Never.

    Args:
        weight: Factor of each task vector.
        lambda_: Factor of what is added.

    Differs from the paper:
        There is none.
    """
    assert base.dim() == 2
    total = sum(((model - base) * weight[i] for i, model in enumerate(models)), torch.zeros_like(base))
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    return base + lambda_ * s[:1].sum() * u[:, :1] @ v[:1]


def squared_norm(base: Tensor, models: list[Tensor]) -> Tensor:
    """Measure the squared norm of all task vectors together."""
    return torch.stack([(model - base).double().square().sum() for model in models]).sum()


def over_root(measured: Tensor) -> Tensor:
    """Solve for the factor."""
    return torch.where(measured > 1e-60, measured.clamp(min=1e-60).rsqrt(), 0.0)


@merge_method(
    family="toys",
    cite="-",
    scope="matrix",
    statistics={"gain": statistic(squared_norm, over_root, over="model")},
    breaks={"identical": "the length is not kept"},
)
def unit(
    base: Tensor, models: list[Tensor], gain: Tensor, *, others: Others = "sum", embeddings: Embeddings = "others"
) -> Tensor:
    """Add the sum of the task vectors, over the norm of those of the whole model.

        merged = base + sum_i delta_i / sqrt(sum_i |delta_i|^2)

    Use when:
        Never.

    Differs from the paper:
        There is none.
    """
    return base + sum(((model - base) * gain for model in models), torch.zeros_like(base))


@merge_method(family="toys", cite="-", scope="matrix")
def noisy(
    base: Tensor, models: list[Tensor], rounding: Tensor, *, others: Others = "sum", embeddings: Embeddings = "others"
) -> Tensor:
    """Fill each matrix with what rounding may be, over the models.

        merged = sum_i rounding_i

    Use when:
        Never.

    Differs from the paper:
        There is none.
    """
    return torch.zeros_like(base) + rounding.sum()
