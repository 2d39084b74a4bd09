"""Merge several small tensors of a bundle in one call, where the result is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.blocks import TensorRun

Split = Callable[[int, list[Tensor]], tuple[Tensor | None, list[Tensor]]]


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
        columns = [list(column) for column in zip(*(inputs[i] for i in found), strict=True)]
        if own[0].together == "stacked":
            base, models = split(found[0], [torch.stack(column) for column in columns])
            merged, each = own[0].merge_several(own, base, models)
            finite = bool(each.all())
        else:
            size = sum(run.size for run in own)
            base, models = split(found[0], [torch.cat(column) for column in columns])
            joined = TensorRun(own[0].kernels, own[0].values, (size,), torch.zeros((1, 2), dtype=torch.int32), size)
            merged, finite = joined.combine({}, (0, size), base, models)
        # merging these tensors one by one finds the one that is not finite
        if finite or allow_nonfinite:
            yield found, merged.reshape(-1).cpu()
