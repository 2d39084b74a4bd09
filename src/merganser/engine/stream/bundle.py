"""Merge the small tensors of a bundle at once, where that gives the same bytes as one by one."""

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
    """Merge those of some tensors that differ in nothing that an element could notice.

    Args:
        runs: The work on each tensor; None for copies.
        inputs: The inputs of each, flat.
        split: Puts inputs like those of a tensor, given by its index, on the device, and tells the base from the
            models.
        allow_nonfinite: Merge NaN and infinity; otherwise tensors in which there are some are left out.

    Yields:
        Indices of tensors, and their results one behind the other, flat, on the CPU. What is left out has to be merged
        by itself.
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
            joined = TensorRun(own[0].kernels, own[0].values, (size,), torch.zeros((1, 2), dtype=torch.int32))
            merged, finite = joined.combine({}, (0, size), base, models)
        # the search for the culprit is left to the tensors one by one
        if finite or allow_nonfinite:
            yield found, merged.reshape(-1).cpu()
