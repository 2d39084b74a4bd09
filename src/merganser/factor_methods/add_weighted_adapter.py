"""PEFT's add_weighted_adapter: its eleven ways to combine adapters."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..errors import ParameterError
from ..method import Fraction, PerModel, Weight, default
from ..method.declare import factor_method
from ..method.factors import Factors
from ..ops import leading
from ..ops.random import Random

Combination = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
Majority = Literal["total", "frequency"]


def largest(values: Tensor, density: Tensor) -> Tensor:
    """Keep the int(density * size) entries of largest magnitude; of equal ones those that topk takes."""
    if density >= 1:
        return values
    count = int(float(density) * values.numel())
    kept = torch.zeros_like(values).reshape(-1)
    found = torch.topk(values.abs().reshape(-1), count).indices
    kept[found] = values.reshape(-1)[found]
    return kept.reshape(values.shape)


def disjoint_mean(tensors: Tensor, weights: Tensor, majority: Majority) -> Tensor:
    """Elect a sign per element, of the sum or by number, and divide the weighted sum of those that agree by their number."""
    signs = tensors.sign()
    votes = tensors if majority == "total" else signs
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = signs == elected
    return (tensors * weights * agree).sum(0) / agree.sum(0).clamp(min=1)


def combined(
    tensors: list[Tensor],
    weights: Tensor,
    combination: str,
    density: Tensor,
    majority: Majority,
    keep: Callable[[int], Tensor],
) -> Tensor:
    """Combine tensors of one shape element by element.

    Args:
        tensors: The tensors.
        weights: One entry per tensor.
        combination: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune".
        density: Share of the entries that is kept.
        majority: How a sign is elected.
        keep: Returns for a position which of the tensor's entries are kept at random.
    """
    if combination.startswith("dare") and density < 1:
        tensors = [tensor * keep(i) / float(density) for i, tensor in enumerate(tensors)]
    elif combination in ("ties", "magnitude_prune"):
        tensors = [largest(tensor, density) for tensor in tensors]
    stacked = torch.stack(tensors)
    shaped = weights.to(stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))
    if combination.endswith("ties"):
        return disjoint_mean(stacked, shaped, majority)
    return (stacked * shaped).sum(0)


def decomposed(delta: Tensor, rank: int, clamp: Tensor) -> Factors:
    """Return the best approximation of rank `rank`, the singular values in B, clamped to a quantile of all entries."""
    kept = min(rank, *delta.shape)
    left, values, right = leading(delta, kept)
    b, a = left * values.to(left.dtype), right.T
    if clamp < 1:
        bound = torch.quantile(torch.cat([b.flatten(), a.flatten()]), float(clamp))
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    more = rank - kept
    return Factors(torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more)))


@factor_method(cite="mangrulkar2022peft")
def add_weighted_adapter(
    models: list[Factors],
    rng: Random,
    rank: int | None,
    *,
    weight: PerModel[Weight] = default(1.0),
    combination_type: Combination = "svd",
    density: Fraction = default(1.0),
    majority_sign_method: Majority = "total",
    svd_clamp: Fraction = default(1.0),
) -> Factors:
    """Combine adapters as PEFT's add_weighted_adapter does, in any of its eleven ways.

        cat     B A with A = [weight_i * scale_i * A_i], B = [B_i]: the sum of the changes, exact, of the sum of the ranks
        linear  A = sum_i sign_i * sqrt|weight_i * scale_i| * A_i,   B = sum_i sqrt|weight_i * scale_i| * B_i
        svd     the truncated decomposition of sum_i weight_i * scale_i * B_i A_i

    `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` apply their rule to the A_i, and to the B_i, with the factors
    of `linear`; with `_svd` behind their names, to the changes scale_i * B_i A_i, of which the result is decomposed.

    Use when:
        The result of PEFT is wanted. `linear` is not a sum of the changes, as it also multiplies factors of different
        adapters; `cat` and `svd` are.

    Args:
        weight: Factor of each adapter.
        combination_type: How the adapters are combined.
        density: Share of the entries that the rules with pruning keep.
        majority_sign_method: Whether the sign is that of the sum, or the one that most adapters have.
        svd_clamp: Entries of decomposed factors are clamped to this quantile of them; at 1 they are not.

    Differs from the paper:
        Random draws are ours, so `dare_linear` and the other DARE ways equal PEFT's except for the draws.
    """
    kind = combination_type if len(models) > 1 else "linear"
    if kind == "cat":
        a = torch.cat([model.a * weight[i] * model.scale for i, model in enumerate(models)])
        return Factors(a, torch.cat([model.b for model in models], dim=1))
    if kind.endswith("svd"):
        deltas = [model.product for model in models]
        rule = kind.removesuffix("_svd") if kind != "svd" else "linear"
        keep = [rng.keep(i, delta.shape, density) for i, delta in enumerate(deltas)] if "dare" in rule else []
        delta = combined(deltas, weight, rule, density, majority_sign_method, keep.__getitem__)
        return decomposed(delta, rank or max(model.rank for model in models), svd_clamp)
    ranks = {model.rank for model in models}
    if len(ranks) > 1:
        raise ParameterError(
            f"combination_type {kind} needs adapters of one rank, got {sorted(ranks)}; svd and cat do not"
        )
    # one draw for both factors of an adapter, so that these are independent
    draws = [rng.keep(i, (model.a.numel() + model.b.numel(),), density) for i, model in enumerate(models)]
    products = [float(weight[i]) * model.scale for i, model in enumerate(models)]
    roots = torch.tensor([math.sqrt(abs(product)) for product in products])
    signs = torch.tensor([-1.0 if product < 0 else 1.0 for product in products])

    def side(tensors: list[Tensor], weights: Tensor, *, first: bool) -> Tensor:
        def keep(i: int) -> Tensor:
            own = draws[i][: tensors[i].numel()] if first else draws[i][-tensors[i].numel() :]
            return own.view(tensors[i].shape)

        return combined(tensors, weights, kind, density, majority_sign_method, keep)

    return Factors(
        side([model.a for model in models], roots * signs, first=True),
        side([model.b for model in models], roots, first=False),
    )
