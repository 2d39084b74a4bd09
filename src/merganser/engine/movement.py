"""Compute, for the run record, how far models and merge moved from the base, and how task vectors are related."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..wording import digits_text
from .plan.plan import Plan
from .plan.tensor import PlannedTensor
from .stream.sample import PAIR_SAMPLE, SAMPLE, Samples

Sums = Mapping[str, NDArray[np.float64]]
"""What `Samples` holds, summed over tensors: squares of the norms, inner products and counts; a row per set of tensors."""


def layer_summary(tensors: Sequence[PlannedTensor], samples: Sequence[Samples]) -> list[dict[str, Any]]:
    """Combine the measurements on samples by layer and role.

    Returns:
        One entry per layer and role: number of tensors and parameters, and the result of `_moved`.
    """
    groups: dict[tuple[int, str], list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        groups[_place(tensor)].append(tensor)
    places = sorted(groups)
    index = {place: i for i, place in enumerate(places)}
    moved = _moved_by_set(samples, lambda tensor: index[_place(tensor)], len(places))
    return [
        {
            "layer": None if layer < 0 else layer,
            "role": role,
            "tensors": len(groups[layer, role]),
            "parameters": sum(t.size for t in groups[layer, role]),
            **found,
        }
        for (layer, role), found in zip(places, moved, strict=True)
    ]


def _place(tensor: PlannedTensor) -> tuple[int, str]:
    return -1 if tensor.layer is None else tensor.layer, tensor.role


def movement(plan: Plan, samples: Sequence[Samples]) -> dict[str, Any]:
    """Combine the measurements on samples over the model, and list them for every tensor.

    Returns:
        `sample` and `pair_sample`: the most elements of a tensor used for distances and for pairs. `inputs`: the base
        (or first model) and the models compared with it; None if tensors differ in their inputs, as in slices, so that
        each tensor lists its own. `from_base`: whether the first of them is a base. `total`: the result of `_moved` for
        all tensors together, without those copied from the base. `tensors`: the same for each tensor, without values
        per pair of models.
    """
    # keyed by TensorInfo object, not by file: two models may share a file (an adapter and its base)
    names: dict[int, str] = {}
    for reference, checkpoint in plan.checkpoints.items():
        names.update(dict.fromkeys(map(id, checkpoint.tensors.values()), str(reference)))
    each = {
        tensor.name: moved
        for found in samples
        for tensor, moved in zip(found.tensors, _moved(_sums(found), each_pair=False), strict=True)
    }
    measured: list[tuple[PlannedTensor, tuple[str | None, ...]]] = []
    for tensor in plan.tensors:
        if tensor.name in each:
            inputs = tuple(map(names.get, map(id, tensor.inputs)))
            # computed tensors, such as the routers of a mixture, come from no input
            if None not in inputs:
                measured.append((tensor, inputs))
    kinds = dict.fromkeys(inputs for _, inputs in measured)
    # some methods copy tensors that are not matrices from the base; these have the base as their only input
    most = max(kinds, key=len, default=())
    alike = all(kind in (most, most[:1]) for kind in kinds)
    merged = {tensor.name: tensor for tensor, inputs in measured if not alike or inputs == most}
    from_base = {tensor.base is not None for tensor in merged.values()}
    tensors = []
    for tensor, inputs in measured:
        entry: dict[str, Any] = {"name": tensor.name, "layer": tensor.layer, "role": tensor.role}
        if not alike:
            entry |= {"inputs": list(inputs), "from_base": tensor.base is not None}
        tensors.append({**entry, **each[tensor.name]})
    total = _moved_by_set(samples, lambda tensor: 0 if tensor.name in merged else None, 1)[0]
    return {
        "sample": SAMPLE,
        "pair_sample": PAIR_SAMPLE,
        "inputs": list(most) if alike and most else None,
        "from_base": from_base.pop() if len(from_base) == 1 else None,
        "total": total if alike else {},
        "tensors": tensors,
    }


def length_warning(total: Mapping[str, Any]) -> str | None:
    """Return a warning if the merged task vector is much longer than a sum or much shorter than an average.

    T orthogonal task vectors of norm 1 have a sum of norm sqrt(T) and an average of norm 1 / sqrt(T). The bounds are
    twice the first and half the second.

    Args:
        total: `total` of the result of `movement`.
    """
    length, count = total.get("length"), len(total.get("models", ()))
    if length is None or count < 2:
        return None
    longest, shortest = math.sqrt(count), 1 / math.sqrt(count)
    if shortest / 2 <= length <= 2 * longest:
        return None
    much, advice = ("long", "lower") if length > longest else ("short", "raise")
    return (
        f"the merged task vector is {digits_text(length)} times as long as the task vectors of the {count} models, which is {much}: "
        f"their average would be {digits_text(shortest)} if they are unrelated, and their sum {digits_text(longest)}; {advice} the weights or "
        "lambda, and measure what is kept (merganser eval)"
    )


def _sums(samples: Samples) -> Sums:
    """Return what is added up over tensors, scaled from the sample to each tensor's size."""
    size = np.array([[float(tensor.size)] for tensor in samples.tensors])
    wide, narrow = (size / n for n in samples.n)
    norms = ("norm", "models", "merged", "rounding")
    return {name: wide * own**2 if name in norms else narrow * own for name, own in samples.values.items()}


def _moved_by_set(
    samples: Sequence[Samples], set_of: Callable[[PlannedTensor], int | None], count: int
) -> list[dict[str, Any]]:
    """Return the result of `_moved` for sets of tensors.

    Args:
        samples: The measurements.
        set_of: Returns the index of the set that a tensor is in; None if it is in none.
        count: Number of sets.

    Returns:
        For each set; empty if tensors of one set differ in their number of models.
    """
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    by_models: dict[int, list[tuple[Sums, list[int | None]]]] = defaultdict(list)
    for each in samples:
        by_models[each.values["models"].shape[1]].append((_sums(each), [set_of(tensor) for tensor in each.tensors]))
    seen: set[int] = set()
    mixed: set[int] = set()
    for parts in by_models.values():
        # tensors with a base have more measurements than others; the sum has those that all tensors have
        names = [name for name in parts[0][0] if all(name in sums for sums, _ in parts)]
        places = [place for _, own in parts for place in own]
        rows = np.array([i for i, place in enumerate(places) if place is not None], dtype=np.int64)
        own = [place for place in places if place is not None]
        mixed |= seen.intersection(own)
        seen.update(own)
        total: dict[str, Any] = {}
        for name in names:
            values = np.concatenate([sums[name] for sums, _ in parts])[rows]
            total[name] = np.zeros((count, values.shape[1]))
            np.add.at(total[name], own, values)
        here = sorted(set(own))
        for i, moved in zip(here, _moved({n: v[here] for n, v in total.items()}, each_pair=True), strict=True):
            found[i] = moved
    return [{} if i in mixed else moved for i, moved in enumerate(found)]


def _moved(sums: Sums, *, each_pair: bool) -> list[dict[str, Any]]:
    """Describe sets of tensors, each as if concatenated into one vector.

    Args:
        sums: The sums over each set.
        each_pair: Whether to return values for every pair of models.

    Returns:
        For each set, `models` and `merged`: distance of each model and of the merge from the base, divided by the norm
        of the base. With a base also `rounding`: the norm of each model's rounding errors divided by its distance; and
        `length`: the norm of the merged task vector divided by the root mean square of the models'. If pairs were
        measured, `cosine`: the mean cosine of all pairs of task vectors; `sign_conflict`: the share of opposite signs
        among elements that both models changed; and per pair, in the order of `itertools.combinations`, `cosines` and
        `sign_conflicts`. Undefined values are None. Empty if a value is not finite.
    """
    with np.errstate(all="ignore"):
        norm = np.sqrt(sums["norm"])
        models, merged = (np.sqrt(sums[name]) / norm for name in ("models", "merged"))
        # JSON cannot express NaN and infinity
        known = (norm > 0).ravel() & np.isfinite(np.concatenate([norm, models, merged], axis=1)).all(1)
        columns: dict[str, list[Any]] = {"models": models.tolist(), "merged": merged.ravel().tolist()}
        if "rounding" in sums:
            columns["rounding"] = _numbers(np.minimum(np.sqrt(sums["rounding"]) / norm / models, 1.0))
            columns["length"] = _numbers(merged.ravel() / np.sqrt(np.mean(models**2, axis=1)))
        if "dots" in sums:
            columns |= _related(sums, models.shape[1], each_pair=each_pair)
    names = list(columns)
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(names, row, strict=True)) if whole else {} for whole, row in zip(known, rows, strict=True)]


def _related(sums: Sums, count: int, *, each_pair: bool) -> dict[str, list[Any]]:
    dots, both, opposite = sums["dots"], sums["both"], sums["opposite"]
    # indices of the pairs (i, i) in the order of combinations_with_replacement
    diagonal = [i * count - i * (i - 1) // 2 for i in range(count)]
    one, two = (list(own) for own in zip(*combinations(range(count), 2), strict=True))
    lengths = np.sqrt(dots[:, diagonal])
    pairs = [diagonal[i] + j - i for i, j in zip(one, two, strict=True)]
    cosines = np.clip(dots[:, pairs] / (lengths[:, one] * lengths[:, two]), -1.0, 1.0)
    defined = ~np.isnan(cosines)
    mean = np.where(defined, cosines, 0.0).sum(axis=1) / defined.sum(axis=1)
    found = {"cosine": _numbers(mean), "sign_conflict": _numbers(opposite.sum(axis=1) / both.sum(axis=1))}
    if each_pair:
        found |= {"cosines": _numbers(cosines), "sign_conflicts": _numbers(opposite / both)}
    return found


def _numbers(values: NDArray[np.float64]) -> list[Any]:
    """Return numbers, or lists of numbers, with None in place of what is not defined."""
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()  # type: ignore[no-any-return]
