"""Exact order statistics without a sort.

The bit pattern of a non-negative float32 grows with its value. A histogram of its upper 15 bits, then one of the lower
16 bits inside the bin that holds the cut, finds the k-th largest value exactly. Both histograms are additive, so
they neither depend on how the work is divided nor need the values to be held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method import Round, Statistic, takes, taking

_HIGH = 1 << 15
_LOW = 1 << 16


def order_statistic(
    values: Callable[..., Sequence[Tensor]],
    ranks: Callable[..., Tensor],
    *,
    over: str = "tensor",
    when: str | None = None,
) -> Statistic:
    """Declare the k-th largest of some non-negative values of every element.

    The statistic has the shape [S, R]: for each of S value tensors the values at its R ranks. A rank of 0 or less
    gives infinity (nothing is that large); a rank beyond the number of elements gives 0.

    Args:
        values: Gets what it names (`base`, `models`, parameters, ...), returns S tensors of non-negative values.
        ranks: Gets what it names, among them `size`, the number of elements; returns the ranks k, counted from 1 for
            the largest, int64, shape [S, R].
        over: "tensor", "model", or the name of the parameter that says which.
        when: Name of the flag without which nothing is measured.
    """
    names = takes(values)
    rank_names = takes(ranks)

    @taking(*names)
    def upper(**given: Any) -> Tensor:
        found = values(**{name: given[name] for name in names})
        return torch.stack([_histogram(_bits(value) >> 16, _HIGH) for value in found])

    @taking("measured", *rank_names)
    def pick(measured: Tensor, **given: Any) -> Tensor:
        wanted = ranks(**{name: given[name] for name in rank_names})
        return _descend(measured.to(torch.int64).unsqueeze(1).expand(-1, wanted.shape[1], -1), wanted)

    @taking("previous", *names)
    def lower(previous: Tensor, **given: Any) -> Tensor:
        found = values(**{name: given[name] for name in names})
        rows = []
        for i, value in enumerate(found):
            bits = _bits(value)
            # values outside the bin are counted in an extra slot
            rows += [
                _histogram(torch.where((bits >> 16) == previous[i, j, 0], bits & (_LOW - 1), _LOW), _LOW + 1)[:_LOW]
                for j in range(previous.shape[1])
            ]
        return torch.stack(rows)

    @taking("measured", "previous", *dict.fromkeys([*rank_names, "size"]))
    def refine(measured: Tensor, previous: Tensor, **given: Any) -> Tensor:
        shape = previous.shape[:2]
        found = _descend(measured.to(torch.int64).view(*shape, _LOW), previous[..., 1])
        bits = ((previous[..., 0] << 16) | found[..., 0]).to(torch.int32)
        cut = bits.view(torch.float32).double()
        wanted = ranks(**{name: given[name] for name in rank_names})
        cut = torch.where(wanted <= 0, torch.inf, cut)
        return torch.where(wanted > given["size"], 0.0, cut)

    return Statistic((Round(upper, pick), Round(lower, refine)), over=over, when=when)


def magnitude_cut(
    values: Callable[..., Sequence[Tensor]], *, density: str = "density", over: str = "tensor", when: str | None = None
) -> Statistic:
    """Declare the smallest magnitude that a trim to `density` keeps, shape [T, 1].

    The cut of model i is the k-th largest magnitude, k = floor(density_i * size); it is infinite when k is 0. All
    entries whose magnitude equals the cut are kept.

    Args:
        values: Returns the magnitudes, one tensor per model.
        density: Name of the per-model parameter.
        over: "tensor", "model", or the name of the parameter that says which.
        when: Name of the flag without which nothing is measured.
    """

    @taking(density, "size")
    def ranks(**given: Any) -> Tensor:
        kept: Tensor = (given[density] * given["size"]).floor()
        return kept.to(torch.int64).unsqueeze(1)

    return order_statistic(values, ranks, over=over, when=when)


def _bits(value: Tensor) -> Tensor:
    """Return the bit pattern of non-negative values as int32; float64 is cut to float32's precision, downwards."""
    flat = value.reshape(-1).abs()
    if flat.dtype == torch.float64:
        flat = (flat.view(torch.int64) & -(1 << 29)).view(torch.float64)
    return flat.float().view(torch.int32)


def _histogram(index: Tensor, bins: int) -> Tensor:
    """Count int32 indices."""
    if torch.compiler.is_compiling():
        counts = torch.zeros(bins, dtype=torch.int32, device=index.device)
        return counts.scatter_add_(0, index.long(), torch.ones_like(index))
    return torch.bincount(index, minlength=bins).to(torch.int32)


def _descend(counts: Tensor, rank: Tensor) -> Tensor:
    """Find the bin of the rank-th largest and the rank inside that bin.

    Args:
        counts: Histogram, int64, shape [S, R, bins].
        rank: Shape [S, R].

    Returns:
        Bin and remaining rank, int64, shape [S, R, 2].
    """
    bins = counts.shape[-1]
    above = counts.flip(-1).cumsum(-1)
    index = torch.searchsorted(above, rank.clamp(min=1).unsqueeze(-1)).squeeze(-1).clamp(max=bins - 1)
    before = torch.where(index > 0, above.gather(-1, (index - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1), 0)
    return torch.stack([bins - 1 - index, rank - before], dim=-1)
