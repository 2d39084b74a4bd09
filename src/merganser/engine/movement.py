"""How far models and merge moved from the base, and how task vectors are related, for the run record."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from .plan.plan import Plan
from .plan.tensor import PlannedTensor
from .stream.sample import PAIR_SAMPLE, SAMPLE

Samples = Mapping[str, Mapping[str, Any]]
"""By name of the tensor, from `sample.measure_samples`."""


def layer_summary(tensors: Sequence[PlannedTensor], samples: Samples) -> list[dict[str, Any]]:
    """Sum up by layer and role what was measured on the samples.

    Returns:
        One entry per layer and role: number of tensors and parameters, and what `_moved` tells of them.
    """
    groups: dict[tuple[int, str], list[PlannedTensor]] = defaultdict(list)
    for tensor in tensors:
        groups[-1 if tensor.layer is None else tensor.layer, tensor.role].append(tensor)
    return [
        {
            "layer": None if layer < 0 else layer,
            "role": role,
            "tensors": len(members),
            "parameters": sum(t.size for t in members),
            **_moved([(t.size, samples[t.name]) for t in members if t.name in samples], each_pair=True),
        }
        for (layer, role), members in sorted(groups.items())
    ]


def movement(plan: Plan, samples: Samples) -> dict[str, Any]:
    """Sum up over the model, and tell of every tensor, what was measured on the samples.

    Returns:
        `sample` and `pair_sample`, the most elements of a tensor that distances and pairs were measured on. `inputs`,
        the base (or first model) and the models that were compared with it; None where tensors differ in that, as in
        slices: then every tensor has its own. `from_base`: whether the first of them is a base. `total`: what `_moved`
        tells of all tensors together, but for those that are copied from the base. `tensors`: the same of each, without
        the values of each pair of models.
    """
    # two models may share a file (an adapter and its base), but no description of a tensor
    names = {id(t): str(reference) for reference, found in plan.checkpoints.items() for t in found.tensors.values()}
    measured = [tensor for tensor in plan.tensors if tensor.name in samples]
    inputs = {tensor.name: [names[id(source)] for source in tensor.inputs] for tensor in measured}
    # of some methods what is no matrix comes from the base alone
    most = max(inputs.values(), key=len, default=[])
    alike = all(found in (most, most[:1]) for found in inputs.values())
    merged = [tensor for tensor in measured if not alike or inputs[tensor.name] == most]
    from_base = {tensor.base is not None for tensor in merged}
    tensors = []
    for tensor in measured:
        entry: dict[str, Any] = {"name": tensor.name, "layer": tensor.layer, "role": tensor.role}
        if not alike:
            entry |= {"inputs": inputs[tensor.name], "from_base": tensor.base is not None}
        tensors.append({**entry, **_moved([(tensor.size, samples[tensor.name])], each_pair=False)})
    return {
        "sample": SAMPLE,
        "pair_sample": PAIR_SAMPLE,
        "inputs": most if alike and most else None,
        "from_base": from_base.pop() if len(from_base) == 1 else None,
        "total": _moved([(t.size, samples[t.name]) for t in merged], each_pair=True) if alike else {},
        "tensors": tensors,
    }


def length_warning(total: Mapping[str, Any]) -> str | None:
    """Return what to say of a merged task vector that is much longer, or shorter, than sums and averages make it.

    T unrelated task vectors of length 1 have a sum of length sqrt(T) and an average of 1 / sqrt(T); twice, and half, of
    these are the bounds.

    Args:
        total: What `movement` tells of all tensors together.
    """
    length, count = total.get("length"), len(total.get("models", ()))
    if length is None or count < 2:
        return None
    longest, shortest = math.sqrt(count), 1 / math.sqrt(count)
    if shortest / 2 <= length <= 2 * longest:
        return None
    much, advice = ("long", "lower") if length > longest else ("short", "raise")
    return (
        f"the merged task vector is {length:.2g} times as long as the task vectors of the {count} models, which is {much}: "
        f"their average would be {shortest:.2g} if they are unrelated, and their sum {longest:.2g}; {advice} the weights or "
        "lambda, and measure what is kept (merganser eval)"
    )


def _moved(samples: Sequence[tuple[int, Mapping[str, Any]]], *, each_pair: bool) -> dict[str, Any]:
    """Put tensors together as if they were one vector; a sample counts for as many elements as its tensor has.

    Args:
        samples: Number of elements and sample of each tensor.
        each_pair: Whether to tell of every pair of models.

    Returns:
        `models` and `merged`: distances of each model and of the merge from the base, over the norm of the base. Where
        there is a base: `rounding`, the share of each task vector that rounding of the model's stored values makes up,
        and `length`, that of the merged task vector over the root mean square of the models'. Where pairs were measured, `cosine` of task vectors, the mean of all pairs; `sign_conflict`, the share of opposite
        directions among all elements that two models changed; and for each pair, in the order of
        `itertools.combinations`, `cosines` and `sign_conflicts`. What is not defined is None; what is not finite, or
        was measured on other numbers of models, is left out.
    """
    norm = math.sqrt(_sum(samples, "norm"))
    if not norm > 0 or len({len(sample["models"]) for _, sample in samples}) != 1:
        return {}
    models = [math.sqrt(_sum(samples, "models", k)) / norm for k in range(len(samples[0][1]["models"]))]
    merged = math.sqrt(_sum(samples, "merged")) / norm
    # JSON knows neither NaN nor infinity
    if not all(map(math.isfinite, [norm, merged, *models])):
        return {}
    found: dict[str, Any] = {"models": models, "merged": merged}
    if all("rounding" in sample for _, sample in samples):
        noise = [math.sqrt(_sum(samples, "rounding", k)) / norm for k in range(len(models))]
        found["rounding"] = [min(a / b, 1.0) if b > 0 else None for a, b in zip(noise, models, strict=True)]
        typical = math.sqrt(sum(value**2 for value in models) / len(models))
        found["length"] = merged / typical if typical > 0 else None
    if all("pairs" in sample for _, sample in samples):
        found |= _related([(size, sample["pairs"]) for size, sample in samples], len(models), each_pair=each_pair)
    return found


def _sum(samples: Iterable[tuple[int, Mapping[str, Any]]], key: str, index: int | None = None) -> float:
    """Add up the squares of norms."""
    total = 0.0
    for size, sample in samples:
        total += size / sample["n"] * (sample[key] if index is None else sample[key][index]) ** 2
    return total


def _related(samples: Sequence[tuple[int, Mapping[str, Any]]], count: int, *, each_pair: bool) -> dict[str, Any]:
    dots, both, opposite = (
        [sum(values) for values in zip(*([size / s["n"] * x for x in s[key]] for size, s in samples), strict=True)]
        for key in ("dots", "both", "opposite")
    )
    # of combinations with replacement, those of a model with itself
    own = [i * count - i * (i - 1) // 2 for i in range(count)]
    cosines = []
    for i, j in combinations(range(count), 2):
        norms = math.sqrt(dots[own[i]]) * math.sqrt(dots[own[j]])
        cosines.append(max(-1.0, min(1.0, dots[own[i] + j - i] / norms)) if norms > 0 else None)
    known = [cosine for cosine in cosines if cosine is not None]
    found: dict[str, Any] = {
        "cosine": sum(known) / len(known) if known else None,
        "sign_conflict": sum(opposite) / sum(both) if sum(both) else None,
    }
    if each_pair:
        found["cosines"] = cosines
        found["sign_conflicts"] = [a / b if b else None for a, b in zip(opposite, both, strict=True)]
    return found
