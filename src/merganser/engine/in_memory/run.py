"""Run a plan in memory: return the tensors that would be written as a state dict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checkpoint import DType, MappedFiles, Reader
from ...checkpoint.float8 import decode_float8
from ..kernels.devices import resolve_devices
from ..plan.plan import Plan
from ..plan.tensor import PlannedTensor
from ..stream.buffers import InputCache
from ..stream.groups import Task, make_groups
from ..stream.schedule import GroupState, KernelCache, Schedule, start_group
from ..stream.threads import work_on_threads
from ..stream.worker import Context, Done


class Memory:
    """Memory that several merges use, one after the other: of their results, and of the files of their inputs, mapped.

    To get fresh memory from the system, and to copy what is in its cache, take as long as a merge of a small model.
    """

    def __init__(self) -> None:
        self.mapped = MappedFiles()
        self._shards: list[Tensor] = []

    def shards(self, plan: Plan) -> list[Tensor]:
        """Return memory for the shards of a plan, uint8; that of the plan before, where it fits."""
        if [shard.numel() for shard in self._shards] != [shard.size for shard in plan.shards]:
            # free the old ones before new ones are allocated
            self._shards = []
            self._shards = [torch.empty(shard.size, dtype=torch.uint8) for shard in plan.shards]
        return self._shards


class _Output:
    """Shards in memory, with the same layout as on disk."""

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self._shards = shards

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final position in a shard."""
        self._shards[shard].numpy().data[offset : offset + data.nbytes] = data.cast("B")

    def tensor(self, tensor: PlannedTensor) -> Tensor:
        """Return a tensor: a view of its shard, or the values that quantised ones stand for."""
        if tensor.gguf is not None:
            data = self._shards[tensor.shard][tensor.offset : tensor.offset + tensor.nbytes]
            return tensor.gguf.decode(data).to(getattr(torch, tensor.dtype.name)).view(tensor.shape)
        stored = self._view(tensor.shard, tensor.offset, tensor.described[0])
        if tensor.quantised is None:
            return stored
        scales = self._view(tensor.quantised.shard, tensor.quantised.offset, tensor.described[1])
        return decode_float8(stored, scales, tensor.quantised.scheme).to(getattr(torch, tensor.dtype.name))

    def _view(self, shard: int, offset: int, described: tuple[str, DType, tuple[int, ...]]) -> Tensor:
        _, dtype, shape = described
        nbytes = dtype.nbytes(math.prod(shape))
        return self._shards[shard][offset : offset + nbytes].view(getattr(torch, dtype.name)).view(shape)


def merge_to_state_dict(
    plan: Plan, *, allow_nonfinite: bool = False, memory: Memory | None = None
) -> dict[str, Tensor]:
    """Run a plan without writing anything to disk.

    Args:
        plan: From `build_plan`.
        allow_nonfinite: Merge NaN and infinity instead of raising an error.
        memory: Memory that merges share; then the tensors are valid until the next merge with it.

    Returns:
        The tensors by name, on the CPU, bit for bit what `run_plan` would write; float8, and what is written as GGUF, in the
        dtype that they would have otherwise.

    Raises:
        CheckpointError: An input is damaged or not finite, or integer buffers differ.
    """
    output = _Output((memory or Memory()).shards(plan))
    devices = resolve_devices(plan.device)
    kernels = [KernelCache(plan, device, check_finite=not allow_nonfinite) for device in devices]
    kept = InputCache(plan.workers, plan.kept)
    schedule = Schedule(
        make_groups(plan),
        lambda group: start_group(group, kernels[0], kept),
        whole_model=plan.whole_model,
        finished={},
        memory=kept,
    )

    def done(state: GroupState, task: Task, result: Done) -> None:
        schedule.done(state, task, result.sums)

    with Reader(mapped=memory.mapped if memory else None) as reader:
        contexts = [
            Context(reader, output, device, lambda *_: None, lambda: schedule.stopping, allow_nonfinite, recorded=False)
            for device in devices
        ]
        work_on_threads(schedule, contexts, kernels, plan.workers, done)
    if schedule.error is not None:
        raise schedule.error
    return {tensor.name: output.tensor(tensor) for tensor in plan.tensors}
