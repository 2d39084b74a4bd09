"""Put the experts of a mixture into the order of a reference: each is matched to the one whose weights are most alike.

Experts of two layers are compared by the cosine of all their weights, plus the cosine of their rows of the router; the
assignment with the largest sum is chosen. Both count alike, however large they are: experts that were copied from one MLP
differ only in the router, and routers that were trained again do not show which experts correspond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...anatomy.experts import ExpertUnits, find_experts
from ...checkpoint import Reader, TensorInfo
from ...checkpoint.derived.derived import read_elements
from ...checkpoint.derived.permuted import permuted
from ...checkpoint.tensor import renamed
from ...errors import CheckpointError
from ..alignment.alignment import Member
from .assignment import Order, Orders, Scores, assign, assign_groups, better, value
from .keep import Kept

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["experts_of", "match_experts", "moved_experts", "with_experts"]

_PIECE = 1 << 22
"""Elements of all experts that are compared at a time."""

Tensors = Mapping[str, TensorInfo]


def experts_of(member: Member) -> list[ExpertUnits]:
    """Return the layers of experts of a model; raises as `find_experts`."""
    shapes = {name: tensor.shape for name, tensor in member.checkpoint.tensors.items()}
    return find_experts(shapes, member.checkpoint.config)


def match_experts(
    reference: Tensors, model: Tensors, ours: Sequence[ExpertUnits], theirs: Sequence[ExpertUnits], kept: Kept
) -> Orders:
    """Return which expert of a model each expert of the result is, for every layer.

    Args:
        reference: The tensors of the reference.
        model: Those of the model.
        ours: The reference's layers of experts.
        theirs: The model's.
        kept: What an earlier run found; gets what is found here.

    Raises:
        CheckpointError: The models have different experts, or weights are not finite.
        UnsupportedError: Experts must be assigned and SciPy is not installed.
    """
    _check(reference, model, ours, theirs)
    found: Orders = {}
    with Reader() as reader:
        for units in ours:
            if units.name not in kept.orders:
                kept.add({units.name: _match(reader, reference, model, units)})
            found[units.name] = kept.orders[units.name]
    return found


def with_experts(member: Member, units: Sequence[ExpertUnits], orders: Orders) -> Member:
    """Return a model with its experts in other orders; nothing is read until it is."""
    tensors = dict(member.checkpoint.tensors)
    stored = member.checkpoint.tensors
    for own in units:
        order = orders[own.name]
        if (order == np.arange(own.size)).all():
            continue
        for names in own.single:
            for place, expert in enumerate(order):
                tensors[names[place]] = renamed(stored[names[expert]], names[place])
        for name in (*own.packed, *own.router):
            tensors[name] = permuted(stored[name], {0: order})
    return replace(member, checkpoint=replace(member.checkpoint, tensors=tensors))


def moved_experts(units: Sequence[ExpertUnits], orders: Orders) -> tuple[int, int]:
    """Return how many experts change their place, of how many."""
    moved = sum(int((orders[own.name] != np.arange(own.size)).sum()) for own in units)
    return moved, sum(own.size for own in units)


def _check(reference: Tensors, model: Tensors, ours: Sequence[ExpertUnits], theirs: Sequence[ExpertUnits]) -> None:
    if [own.name for own in ours] != [own.name for own in theirs]:
        name = min({own.name for own in ours} ^ {own.name for own in theirs})
        raise CheckpointError(f"{name}: only one of the models has experts here, so they cannot be matched")
    for mine, own in zip(ours, theirs, strict=True):
        if mine.size != own.size:
            raise CheckpointError(
                f"{own.name}: the reference has {mine.size} experts, this model {own.size}; only mixtures with the same "
                "number of experts can be matched"
            )
        if mine != own:
            raise CheckpointError(
                f"{own.name}: the reference has other tensors here than this model (or other groups), so the experts cannot "
                "be matched"
            )
        for name in own.tensors:
            if reference[name].shape != model[name].shape:
                raise CheckpointError(
                    f"{name}: has the shape {list(model[name].shape)}, that of the reference {list(reference[name].shape)}"
                )


def _match(reader: Reader, reference: Tensors, model: Tensors, units: ExpertUnits) -> Order:
    """Assign the experts of one layer."""
    scores = _alike(reader, reference, model, [units.router[:1]], units)
    scores += _alike(reader, reference, model, [*units.single, *((name,) for name in units.packed)], units)
    if units.parts > 1:
        # groups differ only in their experts
        order = assign_groups(np.zeros((units.parts, units.parts), np.float32), scores)[1]
    else:
        order = assign(scores)
    still = np.arange(units.size)
    return order if better(value(scores, still), value(scores, order)) else still


def _alike(
    reader: Reader, reference: Tensors, model: Tensors, leaves: Sequence[Sequence[str]], units: ExpertUnits
) -> Scores:
    """Return the cosines of experts by some of their tensors, shape [experts, experts]."""
    import torch

    inner = torch.zeros(units.size, units.size, dtype=torch.float64)
    squares = torch.zeros(2, units.size, dtype=torch.float64)
    for names in leaves:
        count = reference[names[0]].numel // (units.size if len(names) == 1 else 1)
        step = max(1, _PIECE // units.size)
        for start in range(0, count, step):
            end = min(start + step, count)
            ours, theirs = (_rows(reader, held, names, units.size, start, end) for held in (reference, model))
            inner += (ours @ theirs.T).double()
            squares += torch.stack([ours.square().sum(1), theirs.square().sum(1)]).double()
    if not bool(squares.isfinite().all()):
        raise CheckpointError(f"{units.name}: a model holds NaN or infinity here, so its experts cannot be matched")
    lengths = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    found: Scores = (inner / lengths[0][:, None] / lengths[1]).float().numpy()
    return found


def _rows(reader: Reader, held: Tensors, names: Sequence[str], size: int, start: int, end: int) -> Tensor:
    """Return a range of the elements of each expert's tensor, float32, shape [experts, end - start]."""
    import torch

    if len(names) > 1 or size == 1:
        return torch.stack([read_elements(reader, held[name], start, end).float() for name in names])
    [name] = names
    each = held[name].numel // size
    rows = [read_elements(reader, held[name], each * i + start, each * i + end).float() for i in range(size)]
    return torch.stack(rows)
