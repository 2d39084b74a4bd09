"""The random drops of DARE and DELLA, and the rescaling of the entries that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .random import Random
from .rows import by_rank, rank_keys
from .sum import deltas, l1_norms, round_down


def drop(
    base: Tensor, models: Sequence[Tensor], rng: Random, density: Tensor, *, rescale: bool, exact: bool = False
) -> list[Tensor]:
    """Drop entries of the task vectors at random, as DARE does.

    Args:
        base: The base.
        models: The models.
        rng: The draws.
        density: Probability that an entry is kept, one per model, shape [T].
        rescale: Divide the kept entries by that probability.
        exact: Divide in float64, so that rounding does not decide a later sign vote.
    """
    return [
        _survivors(delta, rng.keep(i, delta.shape, density[i]), density[i] if rescale else None, exact)
        for i, delta in enumerate(deltas(base, models))
    ]


def magprune(
    base: Tensor,
    models: Sequence[Tensor],
    rng: Random,
    density: Tensor,
    epsilon: Tensor,
    *,
    rescale: bool,
    exact: bool = False,
) -> list[Tensor]:
    """Drop entries of the task vectors at random, small ones of a row more often, as DELLA does.

    Args:
        base: The base, shape [rows, columns].
        models: The models.
        rng: The draws.
        density: Mean probability that an entry is kept, one per model, shape [T]; 1 keeps all, 0 none.
        epsilon: The smallest entry of a row is kept with probability density - epsilon, the largest with
            density + epsilon.
        rescale: Divide each kept entry by its probability.
        exact: Divide in float64, so that rounding does not decide a later sign vote.
    """
    columns = base.shape[1]
    rank = torch.arange(columns, dtype=torch.float64, device=base.device)
    kept = []
    for i, delta in enumerate(deltas(base, models)):
        spread = torch.where((density[i] > 0) & (density[i] < 1), epsilon[i], 0.0)
        # the only element of a row has no rank, so it is kept with probability `density`
        table = density[i] + spread * (2 * rank / (columns - 1) - 1 if columns > 1 else rank)
        # round the probability up to float32; no draw falls in the gap, so nothing changes
        size = delta.abs()
        probability = by_rank(size, -round_down(-table, delta.dtype), rank_keys(size))
        keep = rng.keep(i, delta.shape, probability)
        kept.append(_survivors(delta, keep, probability if rescale else None, exact))
    return kept


def drop_norms(base: Tensor, models: list[Tensor], rng: Random, density: Tensor) -> Tensor:
    """Measure the L1 norms before and after `drop`, shape [2, T]."""
    return l1_norms(deltas(base, models), drop(base, models, rng, density, rescale=False))


def magprune_norms(base: Tensor, models: list[Tensor], rng: Random, density: Tensor, epsilon: Tensor) -> Tensor:
    """Measure the L1 norms before and after `magprune`, shape [2, T]."""
    return l1_norms(deltas(base, models), magprune(base, models, rng, density, epsilon, rescale=False))


def rescales(rescale: bool, density: tuple[float, ...]) -> bool:
    """Return whether kept entries are rescaled by something other than 1: some, but not all, entries are dropped."""
    return rescale and any(0 < value < 1 for value in density)


def restores_l1(rescale: bool, rescale_to: str, density: tuple[float, ...]) -> bool:
    """Return whether kept entries are scaled to restore the measured L1 norm, instead of by their probability."""
    return rescale_to == "l1" and rescales(rescale, density)


def check_spread(parameters: Mapping[str, Any]) -> str | None:
    """Return a complaint if a probability of `magprune` is not strictly between 0 and 1, else None."""
    for i, (density, epsilon) in enumerate(zip(parameters["density"], parameters["epsilon"], strict=True)):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            return (
                f"density - epsilon and density + epsilon of model {i} must be between 0 and 1, both excluded, got "
                f"density {density:g} and epsilon {epsilon:g}; an epsilon below {min(density, 1 - density):g} will do"
            )
    return None


def _survivors(delta: Tensor, keep: Tensor, probability: Tensor | None, exact: bool) -> Tensor:
    if probability is not None:
        # where the probability is 0, the quotient is discarded: `keep` is False there
        delta = (delta.double() if exact else delta) / probability
    return torch.where(keep, delta, torch.zeros_like(delta))
