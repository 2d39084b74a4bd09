"""Put the hidden units of several models in groups, by how they correlate: the statistic `groups` of ZipIt.

Source: G. Stoica, D. Bolya, J. Bjorner, P. Ramesh, T. Hearn, J. Hoffman, "ZipIt! Merging Models from Different Tasks
without Training", ICLR 2024 (arXiv 2305.03053), section 4 and the authors' code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ...anatomy.symmetry import Units
from ...engine.plan.plan import Plan
from ...errors import RecipeError
from ...statistics import COUNT
from ..forward.skeleton import Block, Skeleton
from ..matching.sums import Correlation, Feature, features, units_of
from ..output.writer import Sum
from ..sums.taps import Seen, Tapped

__all__ = ["GROUPS", "Zipper", "planned_groups", "zip_settings", "zip_units"]

GROUPS = "groups"

Groups = npt.NDArray[np.int64]


class Zipper:
    """Correlations of the hidden units of a block, of all models with each other.

    Args:
        skeleton: The merged model.
        block: The block.
        count: Number of models.
    """

    def __init__(self, skeleton: Skeleton, block: Block, count: int) -> None:
        self._skeleton = skeleton
        self._count = count
        self._units = _in_block(skeleton, block)
        self.places = features(skeleton, block, self._units)
        self._sums = {name: Correlation(_joined(own, count)) for name, own in self.places.items()}
        self._tokens: Counter[str] = Counter()

    def add(self, seen: Sequence[Seen]) -> None:
        """Add what the matrices in `places` received in each model of the same tokens."""
        for name, call in seen[0]:
            if name in self.places:
                feature = self.places[name]
                each = [own[name, call][:, feature.start : feature.start + feature.size] for own in seen]
                self._sums[name].add_own(torch.cat(each, 1))
                self._tokens[name] += len(each[0])

    def result(self, alpha: float, beta: float) -> list[list[Tapped]]:
        """Return for each model the groups of every tensor that holds hidden units of the block, shape [rows + columns]."""
        found: list[list[Tapped]] = [[] for _ in range(self._count)]
        for name, own in self._sums.items():
            feature = self.places[name]
            groups = zip_units(own.result().double().numpy(), self._count, alpha, beta)
            units = next(each for each in self._units if each.name == feature.units)
            for k, mine in enumerate(groups):
                found[k] += _of_tensors(self._skeleton, units, feature, mine, self._tokens[name])
        return found


def zip_units(similarity: npt.NDArray[np.float64], count: int, alpha: float, beta: float) -> Groups:
    """Join the units of several models, two at a time, until as many are left as one model has.

    Args:
        similarity: Of every unit with every other, those of one model next to each other, shape [count n, count n].
        count: Number of models.
        alpha: Factor of the similarities of a unit that was made of two.
        beta: Share of the steps that may join units of the same model.

    Returns:
        The group of each unit of each model, shape [count, n]; groups are numbered in the order of their first units.
    """
    scores = similarity.copy()
    total = len(scores)
    n = total // count
    origin = np.repeat(np.arange(count), n)
    parent = np.arange(total)
    np.fill_diagonal(scores, -np.inf)
    budget = np.full(count, int((total - n) // count * beta + 1e-4))
    for model in range(count):
        if not budget[model]:
            scores[np.ix_(origin == model, origin == model)] = -np.inf
    partner = scores.argmax(1)
    best = scores[np.arange(total), partner]
    alive = np.ones(total, bool)
    for _ in range(total - n):
        row = int(best.argmax())
        pair = (row, int(partner[row])) if np.isfinite(best[row]) else _any_pair(similarity, alive)
        first, second = sorted(pair)
        parent[parent == second] = first
        alive[second] = False
        joined = np.minimum(scores[first], scores[second])
        joined = np.where(np.isfinite(joined), joined * alpha, joined)
        joined[[first, second]] = -np.inf
        scores[first], scores[:, first] = joined, joined
        scores[second], scores[:, second] = -np.inf, -np.inf
        stale = np.isin(partner, (first, second))
        stale[first] = True
        if origin[first] == origin[second]:
            budget[origin[first]] -= 1
            if budget[origin[first]] == 0:
                same = origin == origin[first]
                scores[np.ix_(same, same)] = -np.inf
                stale |= same
        # a negative similarity grows where it is multiplied with alpha
        better = (joined > best) | ((joined == best) & (first < partner))
        partner[better], best[better] = first, joined[better]
        again = np.flatnonzero(stale)
        partner[again] = scores[again].argmax(1)
        best[again] = scores[again, partner[again]]
        best[~alive] = -np.inf
    _, groups = np.unique(parent, return_inverse=True)
    return groups.reshape(count, n).astype(np.int64)


def _any_pair(similarity: npt.NDArray[np.float64], alive: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Return the two of all units left that are most alike; of a unit made of several, the first stands for it."""
    left = np.flatnonzero(alive)
    scores = similarity[np.ix_(left, left)]
    np.fill_diagonal(scores, -np.inf)
    first, second = np.unravel_index(scores.argmax(), scores.shape)
    return int(left[first]), int(left[second])


def zip_settings(plan: Plan, block: Block) -> tuple[float, float]:
    """Return alpha and beta, which all tensors of a block have in common.

    Raises:
        RecipeError: They have not.
    """
    own = [tensor for tensor in plan.tensors if tensor.name in block.sources and tensor.method is plan.method]
    found = {(float(tensor.parameters["alpha"]), float(tensor.parameters["beta"])) for tensor in own}
    if len(found) > 1:
        raise RecipeError(
            f"{plan.recipe.place}: {plan.method.name} zips {block.name} as a whole, and its tensors have different alpha or "
            "beta; give all tensors of a block the same"
        )
    return found.pop()


def planned_groups(skeleton: Skeleton, block: Block) -> list[Tapped]:
    """Return the groups that the tensors of a block will have, without values."""
    units = _in_block(skeleton, block)
    found: list[Tapped] = []
    for feature in features(skeleton, block, units).values():
        own = next(each for each in units if each.name == feature.units)
        found += _of_tensors(skeleton, own, feature, np.arange(feature.size), 0)
    return found


def _in_block(skeleton: Skeleton, block: Block) -> list[Units]:
    return [each for each in units_of(skeleton, ["mlp"]) if each.uses[0].tensor in block.sources]


def _joined(feature: Feature, count: int) -> Feature:
    return replace(feature, size=count * feature.size, start=0)


def _of_tensors(skeleton: Skeleton, units: Units, feature: Feature, groups: Groups, tokens: int) -> list[Tapped]:
    """Return the groups of all outputs and inputs of each tensor that holds hidden units; inputs count from -1 downwards."""
    # the axis of inputs is the same for all matrices of a family: that along which the units are read
    inputs = next(use.axis for use in units.uses if use.tensor == feature.tensor)
    found: list[Tapped] = []
    for tensor in dict.fromkeys(use.tensor for use in units.uses):
        shape = skeleton.checkpoint.tensors[tensor].shape
        index = [np.arange(length) for length in shape]
        for use in units.uses:
            if use.tensor == tensor:
                index[use.axis][use.start : use.start + units.size] = use.start + groups
        if len(shape) > 1:
            index[inputs] = -1 - index[inputs]
        flat = torch.from_numpy(np.concatenate(index)).float()
        sums = {
            COUNT: Sum((), "int64", lambda: torch.tensor(tokens)),
            GROUPS: Sum(tuple(flat.shape), "float32", lambda flat=flat: flat),  # type: ignore[misc]
        }
        found.append(Tapped((tensor,), inputs if len(shape) > 1 else 0, shape[inputs if len(shape) > 1 else 0], sums))
    return found
