"""Exact order statistics without a sort.

The bit pattern of a non-negative number grows with its value. A histogram of its upper 15 bits, then one of the next
16 bits inside the bin that holds the cut, finds the k-th largest float32 exactly; a third one reaches 2**-36 of a
float64. Histograms are additive, so they neither depend on how the work is divided nor need the values to be held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
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
# in place of a value that lies in another bin
_OUTSIDE = -1.0


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
    shift = 32 if wide else 16

    def measured(given: dict[str, Any]) -> list[Tensor]:
        # in their own shape: by flat indices a fused kernel divides for every element, to find its row
        found = values(**{name: given[name] for name in names})
        return [value if wide else comparable(value).float() for value in found]

    @taking(*names)
    def everything(**given: Any) -> Tensor:
        rows = measured(given)
        return torch.stack(rows).reshape(len(rows), -1)

    @taking("measured", "size", *(name for name in rank_names if name not in ("size", "positive")))
    def pick(measured: Tensor, size: Tensor, **given: Any) -> Tensor:
        given.update(size=size, positive=size - measured[:, 0])
        wanted = ranks(**{name: given[name] for name in rank_names})
        found = _descend(measured.unsqueeze(1).expand(-1, wanted.shape[1], -1), wanted)
        found[..., 0] = torch.where(wanted > size, _EVERYTHING, torch.where(wanted <= 0, _NOTHING, found[..., 0]))
        return _bounded(found, shift, wide)

    @taking("previous", *names)
    def inside(previous: Tensor, **given: Any) -> Tensor:
        rows = []
        for value, found in zip(measured(given), previous, strict=True):
            kept = torch.full_like(value, _OUTSIDE)
            for first, end in (_as_values(bounds, value) for bounds in found[:, 2:]):
                # nested: masks are expensive to combine; the end of the last bin is no number
                kept = torch.where(value >= first, torch.where(value >= end, kept, value), kept)
            rows.append(kept)
        return torch.stack(rows).reshape(len(rows), -1)

    def refine(level: int, measured: Tensor, previous: Tensor) -> Tensor:
        found = _descend(measured.view(*previous.shape[:2], _LOW), previous[..., 1])
        prefix = previous[..., 0]
        found[..., 0] = torch.where(prefix < 0, prefix, (prefix << 16) | found[..., 0])
        return _bounded(found, shift - 16 * level, wide)

    def finish(measured: Tensor, previous: Tensor) -> Tensor:
        return _from_bits(refine(levels, measured, previous)[..., 0], wide)

    def at_once(block: Mapping[str, Any], solved: Mapping[str, Any]) -> Tensor:
        found = torch.stack([_patterns(value).reshape(-1).cpu() for value in measured(dict(block))])
        given = {**solved, "positive": ((found >> shift) > 0).sum(1).double()}
        wanted = ranks(**{name: given[name] for name in rank_names})
        return _from_bits(_select(found, wanted), wide)

    levels = shift // 16
    rounds = [Round(everything, pick, tally=_count_all)]
    for level in range(1, levels + 1):
        solve = finish if level == levels else taking("measured", "previous")(partial(refine, level))
        rounds.append(Round(inside, solve, tally=partial(_count_inside, shift - 16 * level)))
    return Statistic(tuple(rounds), over=over, when=when, at_once=at_once)


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


def _as_values(bounds: Tensor, like: Tensor) -> list[Tensor]:
    """Return bit patterns as numbers, 0-d each. Numbers are compared several times faster than bits."""
    whole = torch.int64 if like.dtype == torch.float64 else torch.int32
    return list(bounds.to(whole).view(like.dtype))


def _bounded(found: Tensor, missing: int, wide: bool) -> Tensor:
    """Add the ends of the bins, as bit patterns of the values.

    Args:
        found: Bits found so far and the remaining rank, int64, shape [S, R, 2].
        missing: Bits of the pattern that are not found yet.
        wide: Whether values are float64, whose last 16 bits do not count.

    Returns:
        Shape [S, R, 4].
    """
    prefix = found[..., 0]
    shift = missing + (16 if wide else 0)
    infinite = torch.tensor(torch.inf, dtype=torch.float64 if wide else torch.float32)
    nowhere = int(infinite.view(torch.int64 if wide else torch.int32)) + 1
    ends = [torch.where(prefix < 0, nowhere, (prefix + step) << shift) for step in (0, 1)]
    return torch.stack([found[..., 0], found[..., 1], *ends], dim=-1)


def _from_bits(bits: Tensor, wide: bool) -> Tensor:
    """Return the statistic: patterns as values, infinity and 0 where they do not decide."""
    if wide:
        cut = (bits.clamp(min=0) << 16).view(torch.float64)
    else:
        cut = bits.clamp(min=0).to(torch.int32).view(torch.float32).double()
    cut = torch.where(bits == _NOTHING, torch.inf, torch.where(bits == _EVERYTHING, 0.0, cut))
    return cut.view(torch.int64) if wide else cut


def _select(patterns: Tensor, wanted: Tensor) -> Tensor:
    """Find the k-th largest patterns of a few elements.

    Args:
        patterns: Shape [S, n].
        wanted: Ranks k, shape [S, R].

    Returns:
        Shape [S, R], int64.
    """
    size = patterns.shape[1]
    places = (size - wanted).clamp(0, size - 1)
    rows = [np.partition(row, place)[place] for row, place in zip(patterns.numpy(), places.numpy(), strict=True)]
    found = torch.from_numpy(np.stack(rows)).to(torch.int64)
    return torch.where(wanted > size, _EVERYTHING, torch.where(wanted <= 0, _NOTHING, found))


def _patterns(values: Tensor) -> Tensor:
    """Return the bits of non-negative values as they are told apart: of float32 all, of float64 the upper 47."""
    if values.dtype == torch.float64:
        return (values.view(torch.int64) >> 16) & _WIDE_UNSIGNED
    return values.view(torch.int32) & _UNSIGNED


def _count_all(values: Tensor) -> Tensor:
    """Count the upper 15 bits of every value: shape [S, n], to int32, shape [S, bins]."""
    wide = values.dtype == torch.float64
    whole, shift = (torch.int64, 48) if wide else (torch.int32, 16)
    rows = []
    for row in values:
        codes = (row.view(whole) >> shift).to(torch.int16).bitwise_and_(_HIGH - 1)
        rows.append(torch.bincount(codes, minlength=_HIGH))
    return torch.stack(rows).to(torch.int32)


def _count_inside(shift: int, values: Tensor, previous: Tensor) -> Tensor:
    """Count the next 16 bits of the few values that are inside a bin, and not negative.

    Args:
        shift: Bits of the pattern behind them.
        values: Shape [S, n].
        previous: What is known of the values at each rank, shape [S, R, 4].

    Returns:
        Shape [S * R, bins], int32.
    """
    counts = []
    for row, bins in zip(values, previous[..., 0].tolist(), strict=True):
        if row.device.type == "cpu":
            # numpy skips what is outside several times faster than torch
            array = row.numpy()
            few = _patterns(torch.from_numpy(array[np.flatnonzero(array >= 0)])) >> shift
        else:
            few = _patterns(row[row >= 0]) >> shift
        here = [few if len(bins) == 1 else few[(few >> 16) == prefix] for prefix in bins]
        counts += [torch.bincount(inside & (_LOW - 1), minlength=_LOW) for inside in here]
    return torch.stack(counts).to(torch.int32)


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
