"""RAM+: RAM, with the changes of single models amplified, the more so the more of a model's changes others share."""

from typing import Literal

import torch
from torch import Tensor

from ..method import NonNegative, Weight, default, merge_method, statistic
from ..ops import average_changes, changed


def count_changes(base: Tensor, models: list[Tensor], epsilon: Tensor) -> Tensor:
    """Count for each model the elements that others changed too, and those that only it changed, shape [2, T]."""
    active, count = changed(base, models, epsilon)
    shared = [(mask & (count > 1)).sum() for mask in active]
    unique = [(mask & (count == 1)).sum() for mask in active]
    return torch.stack(shared + unique).view(2, -1)


def factors(measured: Tensor, r: Tensor, alpha: Tensor) -> Tensor:
    """Return the factor of each model's unique changes, shape [T]."""
    shared, unique = measured.double()
    # without unique changes the factor is not used
    return 1 + r * torch.minimum(shared / unique.clamp(min=1), alpha)


@merge_method(
    family="task vectors",
    cite="yuan2026ram",
    statistics={"factor": statistic(count_changes, factors, over="counts")},
    breaks={"identical": "changes up to epsilon are dropped"},
)
def ramplus_tl(
    base: Tensor,
    models: list[Tensor],
    factor: Tensor,
    *,
    r: Weight = default(0.1),
    alpha: NonNegative = default(0.2),
    epsilon: NonNegative = default(1e-5),
    counts: Literal["tensor", "model"] = "tensor",
) -> Tensor:
    """Average the changes that several models made to an element, and add the change of a single model, amplified.

        changed_i = 1 where |delta_i| > epsilon, else 0
        rho_i     = (number of elements that model i and others changed) / (number that only model i changed)
        factor_i  = 1 + r * min(rho_i, alpha)
        merged    = base + factor_i * delta_i where only model i changed the element,
                    base + sum_i changed_i * delta_i / max(1, sum_i changed_i) elsewhere

    Use when:
        RAM would be used, but averaging the shared changes weakens models that share many.

    Args:
        r: Strength of the amplification.
        alpha: Upper limit of the ratio rho.
        epsilon: Changes up to this size count as none.
        counts: Count changes inside each tensor ("tl" in the name: tensor-local), or over the whole model as the
            paper does.

    Differs from the paper:
        The default counts per tensor, as mergekit does; `counts: model` is the paper's.
        The authors' code has alpha 1, and r 0.05 on the command line.
    """
    return base + average_changes(base, models, epsilon, factor)
