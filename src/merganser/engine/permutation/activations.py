"""Find the permutation of a model's units whose activations correlate best with those of a reference.

Source: hidden units as in G. Stoica, D. Bolya, J. Bjorner, P. Ramesh, T. Hearn, J. Hoffman, "ZipIt! Merging Models from
Different Tasks without Training", ICLR 2024 (arXiv 2305.03053), whose permutation baseline takes Pearson correlations of
what follows the activation; attention heads as in N. Verma, M. Elbayad, "Merging Text Transformer Models from Different
Initializations", TMLR 2024 (arXiv 2403.00986), with the channels of a head in their order, since rotary embeddings tie
them to frequencies.

What a unit computes does not depend on the order of others, so every group is assigned by itself, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...anatomy.symmetry import Units
from ...checkpoint import Reader
from ...errors import DataError
from ...statistics.correlations import Correlations
from .assignment import Order, Orders, Scores, assign, assign_groups, check_memory, simple

__all__ = ["match_activations"]


def match_activations(
    correlations: Correlations,
    units: Sequence[Units],
    *,
    known: Mapping[str, Order],
    found: Callable[[Orders], None],
    max_memory: int,
) -> Orders:
    """Return the permutation of a model's units that maximises the sum of their correlations with a reference's.

    Args:
        correlations: Of the reference's units with the model's.
        units: The groups of units that may be permuted.
        known: What an earlier run found, from the same correlations.
        found: Gets the orders of groups as soon as they are final.
        max_memory: Largest memory for one group, bytes.

    Raises:
        DataError: A group has no correlations.
        MemoryLimitError: A group has too many units to be compared within `max_memory`.
        UnsupportedError: Units must be assigned and SciPy is not installed.
    """
    orders: Orders = {}
    with Reader() as reader:
        for group in units:
            names = [each.name for each in (group, group.inner) if each is not None]
            if all(name in known for name in names):
                orders |= {name: known[name] for name in names}
                continue
            own = _assign(reader, correlations, group, max_memory)
            orders |= own
            found(own)
    return orders


def _assign(reader: Reader, correlations: Correlations, group: Units, max_memory: int) -> Orders:
    if group.inner is None:
        scores = _scores(reader, correlations, group, max_memory)
        order = simple(scores)
        if order is None:
            # SciPy works in float64, on two copies
            check_memory(group, 20 * group.size**2, max_memory)
            order = assign(scores)
        return {group.name: order}
    # all that a group of queries computes shows in its queries' outputs
    heads = _scores(reader, correlations, group.inner, max_memory)
    outer, inner = assign_groups(np.zeros((group.size, group.size), np.float32), heads)
    return {group.name: outer, group.inner.name: inner}


def _scores(reader: Reader, correlations: Correlations, units: Units, max_memory: int) -> Scores:
    check_memory(units, 12 * units.size**2, max_memory)
    parts = correlations.units.get(units.name, ())
    if not parts or any(part.shape != (units.size, units.size) for part in parts):
        raise DataError(
            f"{correlations.path}: has no correlations of {units.name}; tensors of the model are named otherwise here than "
            "where it runs, so it can be aligned by weights only"
        )
    total = reader.tensor(parts[0])
    for part in parts[1:]:
        total += reader.tensor(part)
    scores: Scores = total.numpy()
    return scores
