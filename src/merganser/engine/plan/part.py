"""Part of a plan: some of its tensors, merged before the others; and what identifies how tensors are merged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from ...checkpoint import Shard, plan_shards
from .plan import Plan
from .sections.permutation import Permutation
from .tensor import PlannedTensor


def place(tensors: Sequence[PlannedTensor], shards: Sequence[Shard]) -> list[PlannedTensor]:
    """Set shard and offset of every tensor, and return the tensors in the order of the shards' bytes.

    Args:
        tensors: The tensors; they are changed, so they must be in no other plan.
        shards: The files, which hold all of them.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    scaled = {tensor.scale_name: tensor for tensor in tensors if tensor.quantised is not None}
    found = []
    for index, shard in enumerate(shards):
        for name, (offset, nbytes) in shard.entries.items():
            if name in scaled:
                tensor = scaled[name]
                assert tensor.quantised is not None
                tensor.quantised = replace(tensor.quantised, shard=index, offset=offset)
                continue
            placed = by_name.get(name)
            if placed is None:  # a tensor that is copied beside these
                continue
            placed.shard, placed.offset, placed.nbytes = index, offset, nbytes
            found.append(placed)
    return found


def part_of(plan: Plan, tensors: Sequence[PlannedTensor]) -> Plan:
    """Return a plan of some tensors alone, not quantised and as safetensors; they are merged to the same values as in the whole.

    Args:
        plan: The whole plan, without a statistic over the whole model.
        tensors: Tensors of it.
    """
    tensors = [replace(tensor, quantised=None, gguf=None) for tensor in tensors]
    described = [each for tensor in tensors for each in tensor.described]
    shards = plan_shards(described, max(sum(tensor.dtype.nbytes(tensor.size) for tensor in tensors), 1), {})
    return replace(plan, tensors=place(tensors, shards), shards=shards, sidecars=None)


def treatment_hash(tensors: Sequence[PlannedTensor], permutation: Permutation | None = None) -> str:
    """Hash how tensors are merged: names, shapes and dtypes, methods, parameters and layers, in any order.

    Args:
        tensors: The tensors.
        permutation: How models are aligned before; None if they are not.
    """
    # many tensors share one set of parameters, so serialise each set once
    parameters: dict[int, str] = {}
    found: list[str] = []
    for t in tensors:
        if id(t.parameters) not in parameters:
            parameters[id(t.parameters)] = repr(sorted(t.parameters.items()))
        method = (t.method.name, t.method.version, parameters[id(t.parameters)], sorted(t.located.items()))
        inputs = [None if source is None else source.name for source in (t.base, *t.models)]
        found.append(repr((t.name, t.shape, t.dtype.name, t.compute_dtype.name, t.copy, t.role, method, inputs)))
    found += [] if permutation is None else [permutation.digest]
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
