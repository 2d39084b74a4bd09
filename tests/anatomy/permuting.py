"""Random permutations of units, applied to tensors in memory; independent of the engine's way of reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from merganser.anatomy.symmetry import Units


def random_orders(units: Sequence[Units], seed: int) -> dict[str, np.ndarray]:
    """A random element of the group: for each group of units, which old unit stands at each place."""
    draw = np.random.default_rng(seed)
    orders: dict[str, np.ndarray] = {}
    for group in units:
        order = orders[group.name] = draw.permutation(group.size)
        if group.inner is not None:
            each = group.inner.size // group.size
            orders[group.inner.name] = np.concatenate([old * each + draw.permutation(each) for old in order])
    return orders


def permute(
    tensors: Mapping[str, torch.Tensor], units: Sequence[Units], orders: Mapping[str, np.ndarray]
) -> dict[str, torch.Tensor]:
    """Copies of the tensors with their units in these orders."""
    moved = {name: tensor.clone() for name, tensor in tensors.items()}
    for one in [one for group in units for one in (group, group.inner) if one is not None]:
        for use in one.uses:
            old, new = (each[use.tensor].movedim(use.axis, 0) for each in (dict(moved), moved))
            old = old.clone()
            for place, unit in enumerate(orders[one.name]):
                at, source = use.start + place * use.width, use.start + int(unit) * use.width
                new[at : at + use.width] = old[source : source + use.width]
    return moved
