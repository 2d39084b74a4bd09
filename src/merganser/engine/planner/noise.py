"""Measure how far rounding moved quantised inputs, beside their distance from the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...checkpoint import Checkpoint, Reader, TensorInfo
from ...errors import MergeError
from ...recipe import ModelReference
from ...wording import digits_text, some
from ..plan.tensor import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["noise_warnings"]

_TENSORS = 12
"""Tensors on which it is measured, spread over the model."""

_ELEMENTS = 1 << 14
"""Elements at the start of each."""


@dataclass(slots=True)
class _Sums:
    """Sums of squares over the samples of one input, scaled up to the sizes of the tensors."""

    values: float = 0.0
    noise: float = 0.0
    distance: float = 0.0
    compared: bool = field(default=False)


def noise_warnings(checkpoints: Mapping[ModelReference, Checkpoint], tensors: Sequence[PlannedTensor]) -> list[str]:
    """Return a message per quantised input: how it is quantised, and how large its rounding errors are.

    Reads a sample of the weights; nothing is read if no input is quantised.

    Args:
        checkpoints: The inputs.
        tensors: How each tensor of the output is merged.
    """
    quantised = {
        reference: checkpoint for reference, checkpoint in checkpoints.items() if checkpoint.quantisation is not None
    }
    if not quantised:
        return []
    sums = _measure(quantised, tensors)
    found = []
    for reference, checkpoint in quantised.items():
        assert checkpoint.quantisation is not None
        how = f"{reference}: its weights are dequantised ({some(checkpoint.quantisation.schemes, 4)})"
        own = sums[reference]
        if not own.values > 0 or not own.noise > 0 or not math.isfinite(own.values + own.noise + own.distance):
            found.append(how)
            continue
        size = f"rounding has moved them by about {digits_text(math.sqrt(own.noise / own.values))} of their size"
        if own.compared and own.distance > 0:
            size += f", which is {digits_text(math.sqrt(own.noise / own.distance))} times their distance from the base"
        found.append(f"{how}; {size}")
    return found


def _measure(
    quantised: Mapping[ModelReference, Checkpoint], tensors: Sequence[PlannedTensor]
) -> dict[ModelReference, _Sums]:
    owners = {id(tensor): reference for reference, found in quantised.items() for tensor in found.tensors.values()}
    sums = {reference: _Sums() for reference in quantised}
    concerned = [t for t in tensors if not t.copy and any(source.noise is not None for source in t.inputs)]
    step = max(1, len(concerned) // _TENSORS)
    with Reader() as reader:
        for planned in concerned[step // 2 :: step]:
            for source in dict.fromkeys(planned.inputs):
                if source.noise is None or id(source) not in owners:
                    continue
                own = sums[owners[id(source)]]
                values = _start(reader, source)
                if values is None:
                    continue
                scale = source.numel / values.numel()
                own.values += scale * float(values.double().square().sum())
                own.noise += scale * float(source.noise(values).sum())
                base = None if planned.base is None or planned.base is source else _start(reader, planned.base)
                if base is not None and base.shape == values.shape:
                    own.distance += scale * float((values.double() - base.double()).square().sum())
                    own.compared = True
    return sums


def _start(reader: Reader, source: TensorInfo) -> Tensor | None:
    """Return the first elements of a tensor; None if they cannot be read, which the merge itself will say."""
    import torch

    count = min(source.numel, _ELEMENTS)
    if not count:
        return None
    memory = torch.empty(count * source.dtype.itemsize, dtype=torch.uint8)
    try:
        reader.read_into(source, 0, memory.numpy().data)
    except MergeError:
        return None
    return memory.view(getattr(torch, source.dtype.name)).float()
