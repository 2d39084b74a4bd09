"""The coefficients that a tensor has: one, or one for each of its chunks, or for each input of its matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ..forward.experts import expert_matrices, expert_modules
from ..forward.internals import linear_classes
from ..forward.skeleton import Skeleton
from ..reverse.backward import outside_parameters
from ..reverse.parameters import block_parameters, likely_parts

__all__ = ["coefficient_shape", "input_axes"]


def input_axes(skeleton: Skeleton) -> dict[str, int]:
    """Return the axis of each of the checkpoint's matrices that counts its inputs, by name.

    Of an embedding it is that of the hidden dimension. Tensors that are no such matrix are missing.
    """
    axes = _of_parameters(skeleton.model)
    pieces = [(block.sources, block_parameters(block)) for block in skeleton.blocks]
    found: dict[str, int] = {}
    for sources, parameters in (*pieces, (skeleton.outside(head=True), outside_parameters(skeleton))):
        for name, part in likely_parts(skeleton, sources, parameters).items():
            axis = axes.get(part.parameter)
            if axis is not None:
                axis -= part.index is not None
                found[name] = 1 - axis if part.turned else axis
    return found


def _of_parameters(model: nn.Module) -> dict[str, int]:
    kinds = {**linear_classes(), nn.Embedding: 1}
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        axis = next((axis for kind, axis in kinds.items() if isinstance(module, kind)), None)
        if axis is not None:
            found[f"{name}.weight"] = axis
    for name, module in expert_modules(model).items():
        found |= {f"{name}.{own}": axis for own, axis in expert_matrices(module).items()}
    return found


def coefficient_shape(shape: Sequence[int], axis: int | None = None, chunks: int = 1) -> tuple[int, ...]:
    """Return the shape of one model's coefficients of a tensor.

    Args:
        shape: The tensor's.
        axis: The axis whose indices have coefficients of their own; None where no axis has.
        chunks: Without an axis, into how many pieces of consecutive elements the tensor is cut; never more than it has
            elements.
    """
    if axis is None:
        return (max(1, min(chunks, math.prod(shape))),)
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))
