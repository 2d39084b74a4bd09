"""Measure for the run record on the first elements of each tensor, while they are in memory."""

from __future__ import annotations

import base64
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, combinations, combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...ops.linalg.rounding import rounding_norms, rounding_variance
from ..fusion.graph import Unfusable
from ..fusion.machine import why_not
from ..fusion.trace import Form
from ..plan.tensor import PlannedTensor

if TYPE_CHECKING:
    from ..fusion.run import Program

SAMPLE = 1 << 16
"""Elements at the start of each tensor on which distances are measured."""

PAIR_SAMPLE = 1 << 14
"""Elements at the start of each tensor on which pairs of task vectors are compared; fewer, as the number of pairs grows
with the square of the number of models."""

_WORTH_A_PROGRAM = 1 << 18
"""Number of elements of a model's tensors from which compiling a loop for measuring them pays off."""

_TOGETHER = 1 << 17
"""Elements of several small tensors that are measured at a time; in float64 for all models these are megabytes."""


def measure_samples(
    tensors: Sequence[PlannedTensor], inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Measure the distance of models and merge from the base (or first model), and how task vectors are related.

    Args:
        tensors: The planned tensors; copied ones are left out.
        inputs: For each tensor, the base, if any, and the models: the start of the tensor, or all of it.
        outputs: For each tensor, the start of the merged tensor, or all of it.

    Returns:
        The measurements of tensors of one kind together, for the journal; `Samples` reads them.
    """
    # measure tensors of one size together
    groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if not tensor.copy and tensor.size:
            groups[min(outputs[i].numel(), SAMPLE), len(inputs[i]), tensor.base is not None].append(i)
    found = []
    for (size, width, with_base), members in groups.items():
        own = [tensors[i] for i in members]
        values = [[*inputs[i], outputs[i]] for i in members]
        # slice only where needed: slicing very many small tensors takes time
        first = [[data if data.shape == (size,) else data.reshape(-1)[:size] for data in each] for each in values]
        columns = [torch.stack(column) for column in zip(*first, strict=True)]
        found.append(_entry(members, width - 1, with_base, _measure(own, columns, with_base), size))
    return found


def measure_columns(
    tensors: Sequence[PlannedTensor], columns: Sequence[Tensor], outputs: Tensor
) -> list[dict[str, Any]]:
    """Measure merged tensors of one size whose inputs and results lie one after the other.

    Args:
        tensors: The planned tensors, none of them copied.
        columns: Their first inputs, flat, then their second ones, and so on.
        outputs: Their results.

    Returns:
        As from `measure_samples`.
    """
    size, with_base = tensors[0].size, tensors[0].base is not None
    if not size:
        return []
    first = [data.view(len(tensors), size)[:, :SAMPLE] for data in (*columns, outputs)]
    values = _measure(tensors, first, with_base)
    return [_entry([*range(len(tensors))], len(columns) - 1, with_base, values, min(size, SAMPLE))]


def _entry(members: Sequence[int], models: int, with_base: bool, values: Tensor, size: int) -> dict[str, Any]:
    """Return measurements for the journal."""
    about = {"of": members, "n": size, "models": models, "base": with_base}
    return {**about, "values": base64.b64encode(values.numpy().astype("<f8").tobytes()).decode()}


def _measure(tensors: Sequence[PlannedTensor], columns: Sequence[Tensor], with_base: bool) -> Tensor:
    """Measure k tensors of one size.

    Args:
        tensors: The tensors.
        columns: What they are compared with, the models, and the merged tensors, each of shape [k, size].
        with_base: Whether they are compared with a base.

    Returns:
        Shape [k, columns], float64; the columns are those of `_columns`.
    """
    size = columns[0].shape[1]
    noisy = any(source.noise is not None for tensor in tensors for source in tensor.inputs)
    # larger samples gain nothing: few tensors have them, and LLVM needs 40 MB for the loop of so many sums
    if columns[0].numel() >= _WORTH_A_PROGRAM and size <= PAIR_SAMPLE and not noisy:
        measured = _measure_in_a_loop(columns, with_base)
        if measured is not None:
            return measured
    parts = [slice(i, i + (_TOGETHER // size or 1)) for i in range(0, len(tensors), _TOGETHER // size or 1)]
    return torch.cat([_measure_part(tensors[part], [data[part] for data in columns], with_base) for part in parts])


def _measure_part(tensors: Sequence[PlannedTensor], columns: Sequence[Tensor], with_base: bool) -> Tensor:
    """Measure a few tensors, operation by operation; arguments and result as for `_measure`, values stacked."""
    origin, *others = columns
    size = origin.shape[1]
    origin = origin.double()
    deltas = origin.new_empty(len(tensors), len(others), size)
    for k, stored in enumerate(others):
        torch.sub(stored, origin, out=deltas[:, k])
    found = [origin.norm(dim=1, keepdim=True), deltas.norm(dim=2)]
    if with_base:
        # fewer elements suffice to estimate a mean of squares
        few = [stored[:, :PAIR_SAMPLE] for stored in others[:-1]]
        for k, stored in enumerate(few):
            norms = rounding_norms(stored)
            for row, tensor in enumerate(tensors):
                noise = tensor.inputs[k + 1].noise
                if noise is not None:
                    norms[row] = noise(stored[row]).sum().sqrt()
            norms *= (size / stored.shape[1]) ** 0.5
            found.append(torch.where(found[1][:, k] == 0, 0.0, norms).unsqueeze(1))
        if len(few) > 1:
            found += _pairs(deltas[:, :-1, :PAIR_SAMPLE])
    return torch.cat(found, dim=1)


def _measure_in_a_loop(columns: Sequence[Tensor], with_base: bool) -> Tensor | None:
    """Measure many tensors in one loop of machine code; None where there is none.

    Args:
        columns: The tensors that are compared with, the models, and the merged tensors, each of shape [k, n].
        with_base: Whether they are compared with a base.

    Returns:
        As from `_measure`, but for the last bits of sums.
    """
    # the grid to which wider numbers were rounded has to be found for each tensor
    if why_not() is not None or (with_base and any(data.dtype.itemsize > 2 for data in columns[1:-1])):
        return None
    models, size = len(columns) - 2, columns[0].shape[1]
    forms = tuple(Form("block", data.dtype) for data in columns)
    key = (forms, size, with_base)
    with _lock:
        if key not in _programs:
            # needs llvmlite, which some machines lack
            from ..fusion.run import Program

            try:
                _programs[key] = Program(partial(_sums_of_rows, with_base=with_base), forms, size)
            except Unfusable:
                _programs[key] = None
        program = _programs[key]
    if program is None or not program.takes(columns[0].shape):
        return None
    [found] = program.bind(())(columns)
    norms = 2 + models * (2 if with_base else 1)
    found[:, :norms].sqrt_()
    if with_base:
        found[:, 2 + models : norms][found[:, 1 : 1 + models] == 0] = 0.0
    return found


def _sums_of_rows(origin: Tensor, *others: Tensor, with_base: bool) -> tuple[Tensor]:
    """Return what `_measure` returns, but the squares of norms; this becomes a loop."""
    deltas = [stored.double() - origin.double() for stored in others]
    found = [origin.double().square(), *(delta.square() for delta in deltas)]
    vectors = deltas[:-1]
    if with_base:
        found += [rounding_variance(stored, stored.dtype) for stored in others[:-1]]
    if with_base and len(vectors) > 1:
        pairs = [*combinations(vectors, 2)]
        found += [one * two for one, two in combinations_with_replacement(vectors, 2)]
        found += [((one != 0) & (two != 0)).double() for one, two in pairs]
        found += [(one * two < 0).double() for one, two in pairs]
    return (torch.stack([each.sum(1) for each in found], dim=1),)


def _pairs(deltas: Tensor) -> list[Tensor]:
    """Compare the task vectors of several tensors.

    Args:
        deltas: Shape [tensors, models, elements], float64.

    Returns:
        Each with a row per tensor, float64: the inner product of every pair, also of each task vector with itself; and
        per pair of different ones the number of elements that both changed, and how many of these with opposite signs.
        Pairs are in the order of `itertools.combinations` (`_with_replacement`).
    """
    count = deltas.shape[1]
    own, other = zip(*combinations_with_replacement(range(count), 2), strict=True)
    one, two = zip(*combinations(range(count), 2), strict=True)
    signs = deltas.sign().float()  # float32 counts PAIR_SAMPLE elements exactly
    changed = signs.abs()
    both = (changed @ changed.mT)[:, one, two]
    opposite = (both - (signs @ signs.mT)[:, one, two]) / 2
    return [(deltas @ deltas.mT)[:, own, other], both.double(), opposite.double()]


def _columns(models: int, with_base: bool) -> dict[str, int]:
    """Return what is measured of each tensor, in order, and the number of values of each."""
    found = {"norm": 1, "models": models, "merged": 1}
    if with_base:
        found["rounding"] = models
    if with_base and models > 1:
        pairs = models * (models - 1) // 2
        found |= {"dots": pairs + models, "both": pairs, "opposite": pairs}
    return found


@dataclass(frozen=True, slots=True)
class Samples:
    """The measurements of k tensors whose inputs are alike, as float64; every array has a row per tensor.

    Args:
        tensors: The tensors.
        values: `norm` [k, 1] of the base (or first model); `models` [k, T] and `merged` [k, 1], the norms of their
            differences from it. With a base also `rounding` [k, T], the expected norm of each model's rounding errors
            (0 if it equals the base), and, with several models, what `_pairs` returns: `dots`, `both` and `opposite`.
        n: Number of elements that were measured, and of those of which pairs were compared; [k, 1] each.
    """

    tensors: Sequence[PlannedTensor]
    values: Mapping[str, NDArray[np.float64]]
    n: tuple[NDArray[np.float64], NDArray[np.float64]]


def join_samples(found: Iterable[tuple[Sequence[PlannedTensor], Sequence[Mapping[str, Any]]]]) -> list[Samples]:
    """Return the measurements of all tensors, those of a kind together.

    Args:
        found: The tensors of a group, and what `measure_samples` returned for them.
    """
    kinds: dict[tuple[int, bool], list[tuple[Sequence[PlannedTensor], Mapping[str, Any]]]] = defaultdict(list)
    for tensors, each in found:
        for part in each:
            kinds[part["models"], part["base"]].append(([tensors[i] for i in part["of"]], part))
    joined = []
    for (models, with_base), parts in kinds.items():
        columns = _columns(models, with_base)
        texts = b"".join(base64.b64decode(part["values"]) for _, part in parts)
        rows = np.frombuffer(texts, "<f8").reshape(-1, sum(columns.values()))
        cuts = np.split(rows, [*accumulate(columns.values())][:-1], axis=1)
        n = np.concatenate([np.full((len(tensors), 1), float(part["n"])) for tensors, part in parts])
        tensors = [tensor for each, _ in parts for tensor in each]
        joined.append(Samples(tensors, dict(zip(columns, cuts, strict=True)), (n, np.minimum(n, PAIR_SAMPLE))))
    return joined


# programs of this process; the lock also keeps two threads from making the same one
_programs: dict[tuple[Any, ...], Program | None] = {}
_lock = threading.Lock()
