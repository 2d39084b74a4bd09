"""Part of a plan: some of its tensors, merged before the others; and what identifies how tensors are merged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from ...checkpoint import Shard, plan_shards
from .plan import Plan
from .tensor import PlannedTensor


def place(tensors: Sequence[PlannedTensor], shards: Sequence[Shard]) -> list[PlannedTensor]:
    """Set shard and offset of every tensor, in the order of the shards' bytes."""
    by_name = {tensor.name: tensor for tensor in tensors}
    return [
        replace(by_name[name], shard=index, offset=offset, nbytes=nbytes)
        for index, shard in enumerate(shards)
        for name, (offset, nbytes) in shard.entries.items()
    ]


def part_of(plan: Plan, tensors: Sequence[PlannedTensor]) -> Plan:
    """Return a plan of some tensors alone; they are merged to the same bytes as in the whole.

    Args:
        plan: The whole plan, without a statistic over the whole model.
        tensors: Tensors of it.
    """
    described = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    shards = plan_shards(described, max(sum(tensor.nbytes for tensor in tensors), 1), {})
    return replace(plan, tensors=place(tensors, shards), shards=shards, sidecars=None)


def treatment_hash(tensors: Sequence[PlannedTensor]) -> str:
    """Hash how tensors are merged: names, shapes and dtypes, methods, parameters and layers, in any order."""
    # many tensors share one set of parameters, so serialise each set once
    parameters: dict[int, str] = {}
    found: list[str] = []
    for t in tensors:
        if id(t.parameters) not in parameters:
            parameters[id(t.parameters)] = repr(sorted(t.parameters.items()))
        method = (t.method.name, t.method.version, parameters[id(t.parameters)], sorted(t.located.items()))
        inputs = [None if source is None else source.name for source in (t.base, *t.models)]
        found.append(repr((t.name, t.shape, t.dtype.name, t.compute_dtype.name, t.copy, t.role, method, inputs)))
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
