"""Exact order statistics without a sort.

The bit pattern of a non-negative number grows with its value. A histogram of its upper 15 bits, then one of the next
16 bits inside the bin that holds the cut, finds the k-th largest float32 exactly; a third one reaches 2**-36 of a
float64. Histograms are additive, so they neither depend on how the work is divided nor need the values to be held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..method import Round, Statistic, When, takes, taking
from .sum import not_negative

_HIGH = 1 << 15
_LOW = 1 << 16
# the sign of -0.0 is not part of a pattern
_UNSIGNED = (1 << 31) - 1
_WIDE_UNSIGNED = (1 << 47) - 1
# in place of a bin: the answer does not depend on the values
_NOTHING = -1
_EVERYTHING = -2
# in place of lower bits: the value lies in another bin
_OUTSIDE = -1


def order_statistic(
    values: Callable[..., Sequence[Tensor]],
    ranks: Callable[..., Tensor],
    *,
    over: str = "tensor",
    when: When = None,
    wide: bool = False,
) -> Statistic:
    """Declare the k-th largest of some non-negative values of every element.

    The statistic has the shape [S, R]: for each of S value tensors the values at its R ranks. A rank of 0 or less
    gives infinity (nothing is that large); a rank beyond the number of elements gives 0.

    Args:
        values: Gets what it names (`base`, `models`, parameters, ...), returns S tensors of non-negative values.
        ranks: Gets what it names, beside parameters and earlier statistics also `size`, the number of elements, and
            `positive`, for each value tensor the number of elements above 0 (and above 1e-40), shape [S]; returns the
            ranks k, counted from 1 for the largest, int64, shape [S, R].
        over: "tensor", "model", or the name of the parameter that says which.
        when: As in `Statistic`.
        wide: Values are float64 and told apart to 2**-36 of their size, at the price of a third pass; the statistic
            is int64, the bits of the float64 values, for `at_least`. Otherwise values are told apart as float32.
    """
    names = takes(values)
    rank_names = takes(ranks)
    pattern = _wide_pattern if wide else _pattern
    shift = 32 if wide else 16

    @taking(*names)
    def upper(**given: Any) -> Tensor:
        found = values(**{name: given[name] for name in names})
        return torch.stack([(pattern(value) >> shift).to(torch.int16) for value in found])

    @taking("measured", "size", *(name for name in rank_names if name not in ("size", "positive")))
    def pick(measured: Tensor, size: Tensor, **given: Any) -> Tensor:
        given.update(size=size, positive=size - measured[:, 0])
        wanted = ranks(**{name: given[name] for name in rank_names})
        found = _descend(measured.unsqueeze(1).expand(-1, wanted.shape[1], -1), wanted)
        found[..., 0] = torch.where(wanted > size, _EVERYTHING, torch.where(wanted <= 0, _NOTHING, found[..., 0]))
        return found

    def lower(level: int, previous: Tensor, **given: Any) -> Tensor:
        found = values(**{name: given[name] for name in names})
        rows = []
        for i, value in enumerate(found):
            bits = pattern(value) >> (shift - 16 * level)
            inside = [(bits >> 16) == previous[i, j, 0].to(bits.dtype) for j in range(previous.shape[1])]
            rows += [torch.where(here, bits & (_LOW - 1), _OUTSIDE).to(torch.int32) for here in inside]
        return torch.stack(rows)

    def refine(measured: Tensor, previous: Tensor) -> Tensor:
        found = _descend(measured.view(*previous.shape[:2], _LOW), previous[..., 1])
        prefix = previous[..., 0]
        found[..., 0] = torch.where(prefix < 0, prefix, (prefix << 16) | found[..., 0])
        return found

    def finish(measured: Tensor, previous: Tensor) -> Tensor:
        bits = refine(measured, previous)[..., 0]
        if wide:
            cut = (bits.clamp(min=0) << 16).view(torch.float64)
        else:
            cut = bits.clamp(min=0).to(torch.int32).view(torch.float32).double()
        cut = torch.where(bits == _NOTHING, torch.inf, torch.where(bits == _EVERYTHING, 0.0, cut))
        return cut.view(torch.int64) if wide else cut

    levels = shift // 16
    rounds = [Round(upper, pick, tally=_count_all)]
    for level in range(1, levels + 1):
        measure = taking("previous", *names)(partial(lower, level))
        rounds.append(Round(measure, finish if level == levels else refine, tally=_count_inside))
    return Statistic(tuple(rounds), over=over, when=when)


def at_least(value: Tensor, cut: Tensor) -> Tensor:
    """Say where non-negative float64 values reach a cut of a wide order statistic.

    Args:
        value: Any shape, float64.
        cut: 0-d, int64.
    """
    return not_negative(value - cut.view(torch.float64))


def magnitude_cut(
    values: Callable[..., Sequence[Tensor]], *, density: str = "density", over: str = "tensor"
) -> Statistic:
    """Declare the smallest magnitude that a trim to `density` keeps, shape [T, 1].

    The cut of model i is the k-th largest magnitude, k = floor(density_i * size) and at least 1 unless density_i is 0;
    then it is infinite. All entries whose magnitude equals the cut are kept. Where all densities are 1 there is no
    cut, and nothing is measured.

    Args:
        values: Returns the magnitudes, one tensor per model.
        density: Name of the per-model parameter.
        over: "tensor", "model", or the name of the parameter that says which.
    """

    @taking(density, "size")
    def ranks(**given: Any) -> Tensor:
        kept: Tensor = (given[density] * given["size"]).floor().clamp(min=1)
        return torch.where(given[density] > 0, kept, 0.0).to(torch.int64).unsqueeze(1)

    @taking(density)
    def trims(**given: Any) -> bool:
        return any(value < 1 for value in given[density])

    return order_statistic(values, ranks, over=over, when=trims)


def comparable(value: Tensor) -> Tensor:
    """Return non-negative values as they are told apart: float64 is cut to float32's precision, downwards."""
    if value.dtype == torch.float64:
        return (value.view(torch.int64) & -(1 << 29)).view(torch.float64)
    return value


def _pattern(value: Tensor) -> Tensor:
    """Return the bits of non-negative values as they are told apart, int32."""
    return comparable(value).reshape(-1).float().view(torch.int32) & _UNSIGNED


def _wide_pattern(value: Tensor) -> Tensor:
    """Return the upper 47 bits of non-negative float64 values behind the sign, int64."""
    return (value.reshape(-1).view(torch.int64) >> 16) & _WIDE_UNSIGNED


def _count_all(codes: Tensor) -> Tensor:
    """Count the upper bits: int16, shape [S, n], to int32, shape [S, bins]."""
    return torch.stack([torch.bincount(row, minlength=_HIGH) for row in codes]).to(torch.int32)


def _count_inside(codes: Tensor) -> Tensor:
    """Count the lower bits of the few values inside the bin: int32, shape [S * R, n], to int32, shape [S * R, bins]."""
    rows = []
    for row in codes:
        if row.device.type == "cpu":
            # numpy skips what is outside several times faster than torch
            array = row.numpy()
            inside = torch.from_numpy(array[array >= 0])
        else:
            inside = row[row >= 0]
        rows.append(torch.bincount(inside, minlength=_LOW))
    return torch.stack(rows).to(torch.int32)


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
