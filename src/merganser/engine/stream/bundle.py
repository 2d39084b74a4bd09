"""Merge several small tensors of a bundle in one call, where the result is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.blocks import TensorRun

Split = Callable[[int, list[Tensor]], tuple[Tensor | None, list[Tensor]]]


def are_alike(runs: Sequence[TensorRun | None]) -> bool:
    """Return whether tensors have one size, kernels and parameters, with which they can be merged in one call."""
    first = runs[0]
    if len(runs) < 2 or first is None or first.together is None:
        return False
    kernels, values, size = first.kernels, first.values, first.size
    return all(run is not None and run.kernels is kernels and run.values is values and run.size == size for run in runs)


def merge_alike(
    runs: Sequence[TensorRun | None], base: Tensor | None, models: Sequence[Tensor], *, allow_nonfinite: bool
) -> Tensor | None:
    """Merge in one call tensors for which `are_alike` holds.

    Args:
        runs: Their kernels and parameters.
        base: Their bases, one after the other, if the method takes a base.
        models: The same of the models.
        allow_nonfinite: Merge NaN and infinity; otherwise nothing is returned if there are any.

    Returns:
        The merged tensors, one after the other, on the CPU; None if they have to be merged one by one.
    """
    own = [run for run in runs if run is not None]
    first, size = own[0], sum(run.size for run in own)
    how = first.together
    if how is None:
        # found out since they were taken for alike
        return None
    if how == "stacked":
        stacked = None if base is None else base.view(len(own), -1)
        found = first.merge_several(own, stacked, [model.view(len(own), -1) for model in models])
        if found is None:
            return None
        merged, each = found
        finite = bool(each.all())
    else:
        no_keys, name = torch.zeros((1, 2), dtype=torch.int32), f"{first.name} and others"
        joined = TensorRun(first.kernels, first.values, (size,), no_keys, size, name=name)
        merged, finite = joined.combine({}, (0, size), base, models)
    return merged.reshape(-1).cpu() if finite or allow_nonfinite else None


def merge_together(
    runs: Sequence[TensorRun | None], inputs: Sequence[Sequence[Tensor]], split: Split, *, allow_nonfinite: bool
) -> Iterator[tuple[list[int], Tensor]]:
    """Merge in one call small tensors that share kernels, parameters and dtypes.

    Args:
        runs: The kernels and parameters of each tensor; None for copies.
        inputs: The inputs of each tensor, flat.
        split: Moves inputs to the device and separates the base from the models, as for the tensor at an index.
        allow_nonfinite: Merge NaN and infinity; otherwise tensors that share a call with such values are left out.

    Yields:
        Indices of tensors, and their results, flat and concatenated, on the CPU. Tensors that are left out must be
        merged one by one.
    """
    alike: dict[Any, list[int]] = {}
    for i, (run, given) in enumerate(zip(runs, inputs, strict=True)):
        if run is not None and (how := run.together):
            size = run.size if how == "stacked" else None
            kind = (id(run.kernels), id(run.values), size, *(data.dtype for data in given))
            alike.setdefault(kind, []).append(i)
    for found in alike.values():
        own = [run for i in found if (run := runs[i]) is not None]
        if len(own) < 2:
            continue
        columns = [torch.cat(column) for column in zip(*(inputs[i] for i in found), strict=True)]
        merged = merge_alike(own, *split(found[0], columns), allow_nonfinite=allow_nonfinite)
        # merging these tensors one by one finds the one that is not finite
        if merged is not None:
            yield found, merged
