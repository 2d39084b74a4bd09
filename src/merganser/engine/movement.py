"""Compute, for the run record, how far models and merge moved from the base, and how task vectors are related."""

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
"""Measurements by tensor name, from `sample.measure_samples`."""


def layer_summary(tensors: Sequence[PlannedTensor], samples: Samples) -> list[dict[str, Any]]:
    """Combine the measurements on samples by layer and role.

    Returns:
        One entry per layer and role: number of tensors and parameters, and the result of `_moved`.
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
    """Combine the measurements on samples over the model, and list them for every tensor.

    Returns:
        `sample` and `pair_sample`: the most elements of a tensor used for distances and for pairs. `inputs`: the base
        (or first model) and the models compared with it; None if tensors differ in their inputs, as in slices, so that
        each tensor lists its own. `from_base`: whether the first of them is a base. `total`: the result of `_moved` for
        all tensors together, without those copied from the base. `tensors`: the same for each tensor, without values
        per pair of models.
    """
    # keyed by TensorInfo object, not by file: two models may share a file (an adapter and its base)
    names = {id(t): str(reference) for reference, found in plan.checkpoints.items() for t in found.tensors.values()}
    # computed tensors, such as the routers of a mixture, come from no input
    measured = [t for t in plan.tensors if t.name in samples and all(id(source) in names for source in t.inputs)]
    inputs = {tensor.name: [names[id(source)] for source in tensor.inputs] for tensor in measured}
    # some methods copy tensors that are not matrices from the base; these have the base as their only input
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
        f"the merged task vector is {length:.2g} times as long as the task vectors of the {count} models, which is {much}: "
        f"their average would be {shortest:.2g} if they are unrelated, and their sum {longest:.2g}; {advice} the weights or "
        "lambda, and measure what is kept (merganser eval)"
    )


def _moved(samples: Sequence[tuple[int, Mapping[str, Any]]], *, each_pair: bool) -> dict[str, Any]:
    """Combine tensors as if concatenated into one vector; each sample is scaled up to its tensor's size.

    Args:
        samples: Number of elements and sample of each tensor.
        each_pair: Whether to return values for every pair of models.

    Returns:
        `models` and `merged`: distance of each model and of the merge from the base, divided by the norm of the base.
        With a base also `rounding`: the norm of each model's rounding errors divided by its distance; and `length`: the
        norm of the merged task vector divided by the root mean square of the models'. If pairs were measured, `cosine`:
        the mean cosine of all pairs of task vectors; `sign_conflict`: the share of opposite signs among elements that
        both models changed; and per pair, in the order of `itertools.combinations`, `cosines` and `sign_conflicts`.
        Undefined values are None. Empty if a value is not finite, or samples differ in their number of models.
    """
    norm = math.sqrt(_sum(samples, "norm"))
    if not norm > 0 or len({len(sample["models"]) for _, sample in samples}) != 1:
        return {}
    models = [math.sqrt(_sum(samples, "models", k)) / norm for k in range(len(samples[0][1]["models"]))]
    merged = math.sqrt(_sum(samples, "merged")) / norm
    # JSON cannot express NaN and infinity
    if not all(map(math.isfinite, [norm, merged, *models])):
        return {}
    lengths: dict[str, Any] = {"models": models, "merged": merged}
    if all("rounding" in sample for _, sample in samples):
        noise = [math.sqrt(_sum(samples, "rounding", k)) / norm for k in range(len(models))]
        lengths["rounding"] = [min(a / b, 1.0) if b > 0 else None for a, b in zip(noise, models, strict=True)]
        typical = math.sqrt(sum(value**2 for value in models) / len(models))
        lengths["length"] = merged / typical if typical > 0 else None
    if all("pairs" in sample for _, sample in samples):
        lengths |= _related([(size, sample["pairs"]) for size, sample in samples], len(models), each_pair=each_pair)
    return lengths


def _sum(samples: Iterable[tuple[int, Mapping[str, Any]]], key: str, index: int | None = None) -> float:
    """Return the sum over tensors of squared norms, each scaled from the sample to its tensor's size."""
    total = 0.0
    for size, sample in samples:
        total += size / sample["n"] * (sample[key] if index is None else sample[key][index]) ** 2
    return total


def _related(samples: Sequence[tuple[int, Mapping[str, Any]]], count: int, *, each_pair: bool) -> dict[str, Any]:
    dots, both, opposite = (
        [sum(values) for values in zip(*([size / s["n"] * x for x in s[key]] for size, s in samples), strict=True)]
        for key in ("dots", "both", "opposite")
    )
    # indices of the pairs (i, i) in the order of combinations_with_replacement
    diagonal = [i * count - i * (i - 1) // 2 for i in range(count)]
    cosines = []
    for i, j in combinations(range(count), 2):
        norms = math.sqrt(dots[diagonal[i]]) * math.sqrt(dots[diagonal[j]])
        cosines.append(max(-1.0, min(1.0, dots[diagonal[i] + j - i] / norms)) if norms > 0 else None)
    known = [cosine for cosine in cosines if cosine is not None]
    summary: dict[str, Any] = {
        "cosine": sum(known) / len(known) if known else None,
        "sign_conflict": sum(opposite) / sum(both) if sum(both) else None,
    }
    if each_pair:
        summary["cosines"] = cosines
        summary["sign_conflicts"] = [a / b if b else None for a, b in zip(opposite, both, strict=True)]
    return summary
