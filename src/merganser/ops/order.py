"""Exact order statistics without a sort.

The bit pattern of a non-negative float, read as an integer, grows with its value. The first histogram of float32 has a
bin for every number of bfloat16, and a bin for all that lies between two of them. Most differences of 16-bit weights are
numbers of bfloat16, so that the k-th largest mostly is one, and known. Otherwise a second histogram counts the bit patterns
of the bin that holds it. For float64 the first histogram is over the upper 15 bits, followed by two over the next 16 bits
inside the bin of the k-th largest: this resolves 2**-36 of the value; those that equal the smallest number of the first bin
("the common pattern") are not counted again. Histograms are sums over blocks, so the result does not depend on how the work
is divided, and no values are kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, Signature
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..method import Statistic, When, takes
from ..method.statistic import AtOnce, Round
from .histogram import count
from .sum import not_negative

T = TypeVar("T")

_HIGH = 1 << 15
# bins of the first histogram of float32: all numbers of bfloat16, and what lies between these; between the two smallest, in
# two halves, of which the lower one counts as 0
_NUMBERS = (1 << 16) + 1
_HALF = 1 << 15
# bins of a later histogram
_LOW = 1 << 16
# masks that clear the sign bit (of -0.0), and for float64 also the lowest 16 bits
_UNSIGNED = (1 << 31) - 1
_WIDE_UNSIGNED = (1 << 63) - (1 << 16)
# in place of a bin: the rank is outside 1 ... size, so the answer does not depend on the values
_NOTHING = -1
_EVERYTHING = -2


def order_statistic(
    values: Callable[..., Sequence[Tensor]],
    ranks: Callable[..., Tensor],
    *,
    over: str = "tensor",
    when: When = None,
    wide: bool = False,
) -> Statistic:
    """Declare a statistic: the k-th largest of non-negative values that are computed for each element.

    The statistic has the shape [S, R]: for each of S value tensors the values at its R ranks. A rank of 0 or less
    gives infinity (nothing is that large); a rank beyond the number of elements gives 0.

    Args:
        values: Gets the arguments that it names (`base`, `models`, parameters, ...); returns S tensors of non-negative
            values.
        ranks: Gets the arguments that it names: parameters, earlier statistics, `size`, the number of elements, and
            `positive`, for each value tensor the number of elements above 0 (more exactly, above 1e-40), shape [S].
            Returns the ranks k, 1 for the largest, int64, shape [S, R].
        over: "tensor", "model", or the name of the parameter that decides between them.
        when: As in `Statistic`.
        wide: Values are float64 and compared to 2**-36 of their size, at the cost of a third pass; the statistic
            is int64, the bits of the float64 values, for `at_least`. Otherwise values are compared as float32.
    """
    order = _Order(values, ranks, wide)
    names = takes(values)
    of_ranks = [name for name in takes(ranks) if name not in ("size", "positive")]
    pick = _taking("measured", "size", *of_ranks)(order.pick)
    rounds = [Round(_taking(*names)(order.everything), pick, early=None if wide else order.early)]
    # number of low bits of the pattern that are still unknown after each later round
    shifts = (32, 16) if wide else (0,)
    for shift in shifts:
        solve = partial(order.finish if shift == shifts[-1] else order.refine, shift)
        inside = partial(order.inside, shift)
        rounds.append(Round(_taking("previous", *names)(inside), _taking("measured", "previous")(solve)))
    return Statistic(tuple(rounds), over=over, when=when, at_once=AtOnce(order.patterns, order.select))


@dataclass(frozen=True, slots=True)
class _Order:
    """The rounds of an order statistic; arguments as for `order_statistic`."""

    values: Callable[..., Sequence[Tensor]]
    ranks: Callable[..., Tensor]
    wide: bool

    def everything(self, **given: Any) -> Tensor:
        """Count all values by their upper bits."""
        if self.wide:
            return count([_upper_bits(value) for value in self._of(given)], _HIGH)
        return count([_bins(value) for value in self._of(given)], _NUMBERS)

    def pick(self, measured: Tensor, size: Tensor, **given: Any) -> Tensor:
        """Return the interval of the bin that holds the value of each rank."""
        given.update(size=size, positive=size - measured[:, : 1 if self.wide else 2].sum(1))
        wanted = self.ranks(**{name: given[name] for name in takes(self.ranks)})
        found, rank = _descend(measured, wanted)
        outside = torch.where(wanted > size, _EVERYTHING, torch.where(wanted <= 0, _NOTHING, 0))
        number = measured.gather(1, found)
        if self.wide:
            return _interval(found << 48, (found + 1) << 48, rank, outside, found << 48, number, self.wide)
        code = found - (found >= 2).long()
        number_of_bfloat16, between = (code >> 1) << 16, code & 1
        first = torch.where(found == 2, _HALF + 1, number_of_bfloat16 + between)
        end = torch.where(between == 0, first + 1, number_of_bfloat16 + (1 << 16))
        end = torch.where(found == 1, _HALF + 1, end)
        return _interval(first, end, rank, outside, first, number, self.wide)

    def early(self, found: Tensor) -> Tensor | None:
        """Return the statistic if every interval holds a single number."""
        first, end, _, outside, _, _ = found.unbind(-1)
        return _decided(first, outside, self.wide) if bool((end - first <= 1).all()) else None

    def inside(self, shift: int, previous: Tensor, **given: Any) -> Tensor:
        """Count the values in the intervals by their next bits, but those that equal the common pattern."""
        codes = []
        for value, found in zip(self._of(given), previous, strict=True):
            bits = _patterns(value)
            for first, end, common in found[:, [0, 1, 4]].to(bits.dtype):
                own = (bits >= first) & (bits < end) & (bits != common)
                codes.append(torch.where(own, (bits - first) >> shift, torch.full_like(bits, -1)))
        return count(codes, _LOW, few=True)

    def refine(self, shift: int, measured: Tensor, previous: Tensor) -> Tensor:
        """Return the smaller intervals that hold the values of the ranks."""
        first, _, rank, outside, common, number = previous.unbind(-1)
        counts = measured.view(*first.shape, _LOW)
        # add the values that equal the common pattern, which were not counted
        place = ((common - first) >> shift).clamp(0, _LOW - 1).unsqueeze(-1)
        counts = counts.scatter_add(-1, place, (number - counts.sum(-1)).unsqueeze(-1))
        found, rank = (part.squeeze(-1) for part in _descend(counts, rank.unsqueeze(-1)))
        first = first + (found << shift)
        number = counts.gather(-1, found.unsqueeze(-1)).squeeze(-1)
        return _interval(first, first + (1 << shift), rank, outside, common, number, self.wide)

    def finish(self, shift: int, measured: Tensor, previous: Tensor) -> Tensor:
        """Return the statistic."""
        found = self.refine(shift, measured, previous)
        return _decided(found[..., 0], found[..., 3], self.wide)

    def patterns(self, given: Mapping[str, Any]) -> Tensor:
        """Return the patterns of all values of a small tensor, shape [S, n]."""
        return torch.stack([_patterns(value).reshape(-1) for value in self._of(given)])

    def select(self, found: Tensor, given: Mapping[str, Any], earlier: Mapping[str, Tensor]) -> Tensor:
        """Return the statistic of each of several small tensors, from their patterns."""
        found = found.cpu()
        several, needed = {**earlier}, takes(self.ranks)
        if "positive" in needed:
            # the smallest pattern that the first histogram does not count as 0
            least = 1 << 48 if self.wide else _HALF + 1
            several["positive"] = (found >= least).count_nonzero(-1).double()
        own = {name: several[name] for name in needed if name in several}
        shared = {name: given[name] for name in needed if name not in several}
        if own:
            wanted = torch.vmap(lambda one: self.ranks(**shared, **one))(own)
        else:
            wanted = self.ranks(**shared).expand(len(found), -1, -1)
        return _select(found, wanted, self.wide)

    def _of(self, given: Mapping[str, Any]) -> list[Tensor]:
        found = self.values(**{name: given[name] for name in takes(self.values)})
        return [value if self.wide else comparable(value).float() for value in found]


def at_least(value: Tensor, cut: Tensor) -> Tensor:
    """Return where non-negative float64 values are at least the cut of a wide order statistic, bool.

    Args:
        value: Any shape, float64.
        cut: 0-d, int64: the bits of a float64.
    """
    return not_negative(value - cut.view(torch.float64))


def magnitude_cut(
    values: Callable[..., Sequence[Tensor]], *, density: str = "density", over: str = "tensor"
) -> Statistic:
    """Declare a statistic: the smallest magnitude that a trim to `density` keeps, shape [T, 1].

    The cut of model i is the k-th largest magnitude, where k = floor(density_i * size), but at least 1; if density_i is
    0, the cut is infinite. All entries whose magnitude equals the cut are kept. If all densities are 1, there is no
    cut, and nothing is measured.

    Args:
        values: Returns the magnitudes, one tensor per model.
        density: Name of the per-model parameter.
        over: "tensor", "model", or the name of the parameter that decides between them.
    """

    @_taking(density, "size")
    def ranks(**given: Any) -> Tensor:
        kept: Tensor = (given[density] * given["size"]).floor().clamp(min=1)
        return torch.where(given[density] > 0, kept, 0.0).to(torch.int64).unsqueeze(1)

    @_taking(density)
    def trims(**given: Any) -> bool:
        return any(value < 1 for value in given[density])

    return order_statistic(values, ranks, over=over, when=trims)


def comparable(value: Tensor) -> Tensor:
    """Return non-negative values as they are compared: float64 is truncated to 23 mantissa bits, those of float32."""
    if value.dtype == torch.float64:
        return (value.view(torch.int64) & -(1 << 29)).view(torch.float64)
    return value


def _taking(*names: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Declare the arguments of a function that gets them as `**given`, since it is made for any of a method's."""
    signature = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in names])

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        # methods have no attributes of their own
        taken = partial(function)
        taken.__signature__ = signature  # type: ignore[attr-defined]
        return taken

    return decorate


def _interval(
    first: Tensor, end: Tensor, rank: Tensor, outside: Tensor, common: Tensor, number: Tensor, wide: bool
) -> Tensor:
    """Stack what is known about the value at each rank: an interval of bit patterns, int64, shape [S, R, 6].

    Args:
        first: Smallest pattern of the interval, shape [S, R].
        end: Largest pattern of the interval, plus 1.
        rank: Rank among the values in the interval, 1 for the largest.
        outside: _NOTHING or _EVERYTHING where the answer does not depend on the values, else 0.
        common: Pattern that is not counted again, as its number follows from the others; many values may have it.
        number: Number of values in the interval.
        wide: Whether values are float64.
    """
    infinite = torch.tensor(torch.inf, dtype=torch.float64 if wide else torch.float32)
    nowhere = int(infinite.view(torch.int64 if wide else torch.int32)) + 1
    ends = [torch.where(outside < 0, nowhere, bound) for bound in (first, end)]
    return torch.stack([*ends, rank, outside, common, number], dim=-1)


def _decided(patterns: Tensor, outside: Tensor, wide: bool) -> Tensor:
    """Return the statistic: patterns as values; infinity or 0 where `outside` says so.

    Args:
        patterns: Shape [..., S, R].
        outside: As in `_interval`.
        wide: Whether values are float64.
    """
    values = patterns.view(torch.float64) if wide else patterns.to(torch.int32).view(torch.float32).double()
    cut = torch.where(outside == _NOTHING, torch.inf, torch.where(outside == _EVERYTHING, 0.0, values))
    return cut.view(torch.int64) if wide else cut


def _select(patterns: Tensor, wanted: Tensor, wide: bool) -> Tensor:
    """Return the k-th largest values of small tensors.

    Args:
        patterns: Shape [tensors, S, n].
        wanted: Ranks k, shape [tensors, S, R].
        wide: Whether values are float64.

    Returns:
        The statistic, shape [tensors, S, R].
    """
    size = patterns.shape[-1]
    values, places = patterns.numpy(), (size - wanted).clamp(0, size - 1).numpy()
    found = np.empty(places.shape, dtype=np.int64)
    for i in range(places.shape[1]):
        # tensors of one size mostly have the same ranks: one partition serves them all
        own = places[:, i]
        for place in own[:1] if (own == own[:1]).all() else np.unique(own, axis=0):
            alike = (own == place).all(axis=1)
            found[alike, i] = np.partition(values[alike, i], place, axis=-1)[:, place]
    outside = torch.where(wanted > size, _EVERYTHING, torch.where(wanted <= 0, _NOTHING, 0))
    return _decided(torch.from_numpy(found), outside, wide)


def _patterns(values: Tensor) -> Tensor:
    """Return the bits by which non-negative values are compared: all 31 of float32, the upper 47 of 63 of float64."""
    if values.dtype == torch.float64:
        return values.view(torch.int64) & _WIDE_UNSIGNED
    return values.view(torch.int32) & _UNSIGNED


def _upper_bits(values: Tensor) -> Tensor:
    """Return the bin of float64 in the first histogram, int16: the upper 15 bits after the sign."""
    return ((values.view(torch.int64) >> 48) & (_HIGH - 1)).to(torch.int16)


def _bins(values: Tensor) -> Tensor:
    """Return the bin of float32 in the first histogram, int32; NaN counts as infinity there."""
    # abs, for -0.0
    size = values.abs()
    bits = torch.where(size >= 0, size, torch.full_like(size, torch.inf)).view(torch.int32)
    between = ((bits & 0xFFFF) + 0xFFFF) >> 16
    return (bits >> 16) * 2 + between + (bits > _HALF).to(torch.int32)


def _descend(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of the rank-th largest value and its rank inside that bin, int64, shape [..., R] each.

    Args:
        counts: Histograms, int64, shape [..., bins].
        rank: Shape [..., R].
    """
    up_to = counts.cumsum(-1)
    total = up_to[..., -1:]
    index = torch.searchsorted(up_to, total - rank.clamp(min=1) + 1)
    return index, rank - (total - up_to.gather(-1, index))
