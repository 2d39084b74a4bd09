"""Make and restore sidecars of one tensor in memory, without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...method import MergeMethod, Part
from ...method.method import fill
from ..kernels.blocks import BLOCK
from ..kernels.merge_tensor import merge_tensor
from .codec import OWN, Codec, Span, keeps


@dataclass(frozen=True, slots=True)
class TensorSidecar:
    """The merged tensor, and its stored parts.

    Args:
        merged: The merged tensor.
        declared: The declared parts, by name.
        shared: Shared parts by name, flat.
        tasks: For each task, its parts by name, flat.
    """

    merged: Tensor
    declared: Mapping[str, Part]
    shared: Mapping[str, Tensor]
    tasks: Sequence[Mapping[str, Tensor]]


def make_sidecar(
    method: MergeMethod,
    base: Tensor,
    models: Sequence[Tensor],
    parameters: Mapping[str, Any] | None = None,
    *,
    block: int = BLOCK,
) -> TensorSidecar:
    """Merge a tensor, and make the parts that restore each model's tensor.

    Args:
        method: A method with a sidecar.
        base: The base.
        models: The models, of the same shape.
        parameters: Parameters by their names in recipes.
        block: Most elements per block; a multiple of 8.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
    """
    filled = fill(method, parameters or {}, len(models))
    merged = merge_tensor(method, base, models, parameters, allow_nonfinite=True)
    kept = keeps(method, filled, "tensor", base.shape, None)
    if kept is not None:
        own = kept == OWN
        declared = {OWN: Part(tuple(base.shape))} if own else {}
        return TensorSidecar(merged, declared, {}, [{OWN: model.reshape(-1)} if own else {} for model in models])
    codec = Codec(method, filled, tuple(base.shape), len(models), block=block)
    compute = _compute([base, *models, merged])

    def cut(tensor: Tensor, span: Span) -> Tensor:
        return tensor.reshape(-1)[span.start : span.end].to(compute).reshape(span.shape)

    def blocks(span: Span) -> tuple[Tensor, list[Tensor], Tensor]:
        return cut(base, span), [cut(model, span) for model in models], cut(merged, span)

    known: dict[str, Tensor] = {}

    def measure(name: str, index: int) -> Tensor:
        measured = [codec.measure(name, index, *blocks(span), known) for span in codec.blocks]
        return sum(measured[1:], measured[0])

    codec.solve_statistics(["tensor", "model"], measure, known, base.numel())
    dtypes = [merged.dtype, *(model.dtype for model in models)]
    stored = [codec.encode(span, *blocks(span), known, dtypes) for span in codec.blocks]
    declared = codec.all_parts
    shared = {name: torch.cat([_one(each[name]) for each in stored]) for name, part in declared.items() if part.shared}
    own_names = [name for name, part in declared.items() if not part.shared and name not in known]
    tasks = [
        {name: torch.cat([_one(each[name], i) for each in stored]) for name in own_names}
        | {name: known[name][i] for name, _, _ in codec.statistics}
        for i in range(len(models))
    ]
    return TensorSidecar(merged, declared, shared, tasks)


def restore_tensor(
    method: MergeMethod,
    sidecar: TensorSidecar,
    task: int,
    base: Tensor,
    parameters: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Return a task's tensor, restored from the merged tensor and its parts.

    Args:
        method: The method.
        sidecar: From `make_sidecar`.
        task: Position of the task's model.
        base: The base.
        parameters: As for `make_sidecar`.
        dtype: Dtype of the task's model; by default that of the merged tensor.
        block: As for `make_sidecar`.
    """
    merged, task_sidecar = sidecar.merged, sidecar.tasks[task]
    dtype = dtype or merged.dtype
    if OWN in task_sidecar or not sidecar.declared:
        return task_sidecar.get(OWN, merged).to(dtype).reshape(merged.shape)
    codec = Codec(
        method, fill(method, parameters or {}, len(sidecar.tasks)), tuple(merged.shape), len(sidecar.tasks), block=block
    )
    compute = _compute([base, merged, torch.empty(0, dtype=dtype)])
    restored = torch.empty(merged.numel(), dtype=dtype)
    positions = dict.fromkeys(sidecar.declared, 0)
    for span in codec.blocks:
        stored = {name: task_sidecar[name] for name, _, _ in codec.statistics}
        for name, part in codec.parts(span.shape).items():
            start = positions[name]
            positions[name] += torch.Size(part.shape).numel()
            stored[name] = (sidecar.shared if part.shared else task_sidecar)[name][start : positions[name]]
        before, shared = (t.reshape(-1)[span.start : span.end].to(compute).reshape(span.shape) for t in (base, merged))
        restored[span.start : span.end] = codec.decode(span, task, before, shared, stored).reshape(-1).to(dtype)
    return restored.reshape(merged.shape)


def _compute(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _one(part: Tensor | Sequence[Tensor], task: int | None = None) -> Tensor:
    if isinstance(part, Tensor):
        return part
    assert task is not None
    return part[task]
