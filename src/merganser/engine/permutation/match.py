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

from ...anatomy.symmetry import Units, Use
from ...checkpoint import Reader, TensorInfo
from ...checkpoint.derived.derived import read_whole
from ...errors import CheckpointError
from .assignment import (
    Order,
    Orders,
    Scores,
    assign,
    assign_groups,
    better,
    check_memory,
    nothing_moved,
    simple,
    value,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["indices", "match_weights"]

_SWEEPS = 100
"""Most rounds of coordinate descent, as published."""

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
        """Assign the units of a group again; return whether that made the models more alike."""
        mine = [group.name] if group.inner is None else [group.name, group.inner.name]
        scores = self._scores(group, group.uses if uses is None else uses, mine)
        if group.inner is None:
            order = simple(scores)
            if order is None:
                # SciPy works in float64, on two copies
                check_memory(group, 20 * group.size**2, self._max_memory)
                order = assign(scores)
            return self._take(group.name, order, scores)
        heads = self._scores(group.inner, group.inner.uses, mine)
        outer, inner = assign_groups(scores, heads)
        before = value(scores, self.orders[mine[0]]) + value(heads, self.orders[mine[1]])
        after = value(scores, outer) + value(heads, inner)
        if not better(before, after):
            return False
        self.orders |= {mine[0]: outer, mine[1]: inner}
        return True

    def _take(self, name: str, order: Order, scores: Scores) -> bool:
        if not better(value(scores, self.orders[name]), value(scores, order)):
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
        check_memory(group, 4 * group.size**2 + 12 * largest, self._max_memory)
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


def _alone(one: Units) -> Units:
    """Return a group of units without its inner one."""
    return Units(one.name, one.kind, one.size, one.uses)
