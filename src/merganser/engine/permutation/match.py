"""Find the permutation of a model's units that brings its weights nearest to those of a reference.

Source: S. K. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023
(arXiv 2209.04836), section 3.2, weight matching: coordinate descent over groups of units, an assignment problem each.
The groups are visited in a fixed order, so the result does not depend on a seed. Groups of queries are assigned in two
levels, as the heads of N. Verma, M. Elbayad, "Merging Text Transformer Models from Different Initializations", TMLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...anatomy.symmetry import Units, Use
from ...checkpoint import Reader, TensorInfo
from ...checkpoint.derived import read_whole
from ...errors import CheckpointError, MemoryLimitError, UnsupportedError
from ...wording import size_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Order",
    "Orders",
    "Scores",
    "assign",
    "assign_groups",
    "better",
    "indices",
    "match_weights",
    "nothing_moved",
]

Order = npt.NDArray[np.int64]
Orders = dict[str, Order]
"""For each group of units, by its name: which unit of the model each unit of the result is."""

Scores = npt.NDArray[np.float32]

_SWEEPS = 100
"""Most rounds of coordinate descent, as published."""

_GAIN = 1e-6
"""Smallest gain of a step, relative to its value; smaller ones may be rounding."""

_PIECE = 1 << 22
"""Elements of a matrix of scores that are computed at a time."""


def match_weights(
    reference: Mapping[str, TensorInfo],
    model: Mapping[str, TensorInfo],
    units: Sequence[Units],
    *,
    known: Mapping[str, Order],
    found: Callable[[Orders], None],
    max_memory: int,
) -> Orders:
    """Return the permutation of a model's units that maximises the inner product of its weights with a reference's.

    Args:
        reference: The tensors of the reference, by name.
        model: Those of the model; names, shapes and units are the same, but for tensors that only one of them has.
        units: The groups of units that may be permuted.
        known: What an earlier run found, of the same models and units.
        found: Gets the orders of groups as soon as they are final.
        max_memory: Largest memory for one group, bytes.

    Raises:
        CheckpointError: A tensor cannot be read, or holds NaN or infinity.
        MemoryLimitError: A group has too many units to be compared within `max_memory`.
        UnsupportedError: Units must be assigned and SciPy is not installed.
    """
    with Reader() as reader:
        matcher = _Matcher(reader, reference, model, units, max_memory)
        if any(group.kind == "residual" for group in units):
            names = [each.name for group in units for each in (group, group.inner) if each is not None]
            if not all(name in known for name in names):
                matcher.descend()
                found(matcher.orders)
                return matcher.orders
            matcher.orders |= known
            return matcher.orders
        # without the residual stream the groups do not depend on each other
        for group in units:
            own = [each.name for each in (group, group.inner) if each is not None]
            if all(name in known for name in own):
                matcher.orders |= {name: known[name] for name in own}
            else:
                matcher.improve(group)
                found({name: matcher.orders[name] for name in own})
        return matcher.orders


def nothing_moved(units: Sequence[Units]) -> Orders:
    """Return the orders that leave every unit where it is."""
    each = [one for group in units for one in (group, group.inner) if one is not None]
    return {one.name: np.arange(one.size) for one in each}


def indices(
    units: Sequence[Units], orders: Orders, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[int, Order]]:
    """Return which index of a tensor each index of the permuted one is, by tensor and axis; only axes that change."""
    found: dict[str, dict[int, Order]] = {}
    for one in [one for group in units for one in (group, group.inner) if one is not None]:
        order = orders[one.name]
        if (order == np.arange(len(order))).all():
            continue
        for use in one.uses:
            axes = found.setdefault(use.tensor, {})
            index = axes.setdefault(use.axis, np.arange(shapes[use.tensor][use.axis]))
            moved = use.start + order[:, None] * use.width + np.arange(use.width)
            index[use.start : use.start + moved.size] = moved.reshape(-1)
    return found


class _Matcher:
    """Coordinate descent over the groups of one model."""

    def __init__(
        self,
        reader: Reader,
        reference: Mapping[str, TensorInfo],
        model: Mapping[str, TensorInfo],
        units: Sequence[Units],
        max_memory: int,
    ) -> None:
        self.orders = nothing_moved(units)
        self._reader = reader
        self._reference = reference
        self._model = model
        self._units = units
        self._max_memory = max_memory

    def descend(self) -> None:
        """Improve one group after the other until none gets better."""
        residual = [group for group in self._units if group.kind == "residual"]
        others = [group for group in self._units if group.kind != "residual"]
        # at first only by tensors that hold no other units, as the order of those is not known yet
        held = {use.tensor for g in others for one in (g, g.inner) if one is not None for use in one.uses}
        for group in residual:
            self.improve(group, [use for use in group.uses if use.tensor not in held])
        for _ in range(_SWEEPS):
            better = [self.improve(group) for group in [*others, *residual]]
            if not any(better):
                return

    def improve(self, group: Units, uses: Sequence[Use] | None = None) -> bool:
        """Assign the units of a group anew; return whether that made the models more alike."""
        mine = [group.name] if group.inner is None else [group.name, group.inner.name]
        scores = self._scores(group, group.uses if uses is None else uses, mine)
        if group.inner is None:
            order = simple(scores)
            if order is None:
                # SciPy works in float64, on two copies
                _check_memory(group, 20 * group.size**2, self._max_memory)
                order = assign(scores)
            return self._take(group.name, order, scores)
        heads = self._scores(group.inner, group.inner.uses, mine)
        outer, inner = assign_groups(scores, heads)
        before = _value(scores, self.orders[mine[0]]) + _value(heads, self.orders[mine[1]])
        after = _value(scores, outer) + _value(heads, inner)
        if not _better(before, after):
            return False
        self.orders |= {mine[0]: outer, mine[1]: inner}
        return True

    def _take(self, name: str, order: Order, scores: Scores) -> bool:
        if not better(scores, self.orders[name], order):
            return False
        self.orders[name] = order
        return True

    def _scores(self, group: Units, uses: Sequence[Use], mine: Sequence[str]) -> Scores:
        """Return inner products of the reference's units with the model's, shape [size, size], float32.

        All other groups of the model have their present order.
        """
        import torch

        largest = max((self._model[use.tensor].numel for use in uses if use.tensor in self._model), default=0)
        # the scores, and two tensors in float32 with one as it is stored
        _check_memory(group, 4 * group.size**2 + 12 * largest, self._max_memory)
        scores = torch.zeros(group.size, group.size)
        shapes = {name: tensor.shape for name, tensor in self._model.items()}
        others = [one for g in self._units for one in (g, g.inner) if one is not None and one.name not in mine]
        axes = indices([_alone(one) for one in others], self.orders, shapes)
        for use in uses:
            if use.tensor not in self._reference or use.tensor not in self._model:
                continue
            ours = self._rows(self._reference[use.tensor], use, group.size, {})
            theirs = self._rows(self._model[use.tensor], use, group.size, axes.get(use.tensor, {}))
            step = max(1, _PIECE // group.size)
            for at in range(0, group.size, step):
                scores[at : at + step] += ours[at : at + step] @ theirs.T
        if not bool(torch.isfinite(scores).all()):
            raise CheckpointError(f"{group.name}: a model holds NaN or infinity here, so its units cannot be matched")
        found: Scores = scores.numpy()
        return found

    def _rows(self, tensor: TensorInfo, use: Use, size: int, axes: Mapping[int, Order]) -> Tensor:
        """Return a row of values for every unit, float32."""
        import torch

        values = read_whole(self._reader, tensor)
        for axis, index in axes.items():
            values = values.index_select(axis, torch.from_numpy(index))
        values = values.movedim(use.axis, 0)[use.start : use.start + size * use.width]
        return values.reshape(size, -1).float()


def simple(scores: Scores) -> Order | None:
    """Return the best assignment if every row has its largest score in a column of its own, else None.

    A row whose unit scores best where it is stays there, also if another scores as much.
    """
    size = len(scores)
    if (scores.diagonal() >= scores.max(axis=1)).all():
        return np.arange(size)
    columns: Order = scores.argmax(axis=1).astype(np.int64)
    return columns if len(np.unique(columns)) == size else None


def assign(scores: Scores) -> Order:
    """Return the assignment with the largest sum of scores: for each row its column, each column once.

    Raises:
        UnsupportedError: The best columns of two rows are the same, which needs SciPy, and it is not installed.
    """
    found = simple(scores)
    if found is not None:
        return found
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise UnsupportedError("aligning these models needs SciPy: pip install 'merganser[align]'") from None
    assigned: Order = linear_sum_assignment(scores, maximize=True)[1].astype(np.int64)
    return assigned


def assign_groups(groups: Scores, heads: Scores) -> tuple[Order, Order]:
    """Assign groups of heads, and within each pair of groups their heads.

    Args:
        groups: Scores of what a group has once (its keys and values), shape [groups, groups].
        heads: Scores of its heads, those of one group next to each other, shape [heads, heads].

    Returns:
        The orders of the groups, and of all heads.
    """
    count, each = len(groups), len(heads) // len(groups)
    blocks = heads.reshape(count, each, count, each).transpose(0, 2, 1, 3)
    if (heads.diagonal() >= heads.max(axis=1)).all() and (groups.diagonal() >= groups.max(axis=1)).all():
        return np.arange(count), np.arange(len(heads))
    inner = {(i, j): assign(blocks[i, j]) for i in range(count) for j in range(count)}
    sums = [[float(groups[i, j]) + _value(blocks[i, j], inner[i, j]) for j in range(count)] for i in range(count)]
    outer = assign(np.array(sums, np.float32))
    return outer, np.concatenate([j * each + inner[i, int(j)] for i, j in enumerate(outer)])


def better(scores: Scores, before: Order, after: Order) -> bool:
    """Return whether the sum of scores grows by more than rounding when the second order takes the place of the first."""
    return _better(_value(scores, before), _value(scores, after))


def _alone(one: Units) -> Units:
    """Return a group of units without its inner one."""
    return Units(one.name, one.kind, one.size, one.uses)


def _check_memory(group: Units, needed: int, allowed: int) -> None:
    if needed > allowed:
        raise MemoryLimitError(
            f"{group.name}: comparing {group.size:,} units takes {size_text(needed)}, and {size_text(allowed)} are allowed; "
            f"raise --max-memory, or leave {group.kind!r} out of 'units'"
        )


def _value(scores: Scores, order: Order) -> float:
    return float(scores[np.arange(len(order)), order].sum(dtype=np.float64))


def _better(before: float, after: float) -> bool:
    return after > before + _GAIN * abs(before)
