"""Run a plan in memory: return the tensors that would be written as a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Reader
from .kernels.compiled import prepare_compiler_cache
from .kernels.devices import resolve_devices
from .plan.plan import Plan
from .stream.buffers import InputCache
from .stream.groups import Task, make_groups
from .stream.schedule import GroupState, KernelCache, Schedule, start_group
from .stream.threads import work_on_threads
from .stream.worker import Context, Done


class _Memory:
    """Shards in memory, with the same layout as on disk."""

    def __init__(self, plan: Plan) -> None:
        self._shards = [torch.empty(shard.size, dtype=torch.uint8) for shard in plan.shards]

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final position in a shard."""
        self._shards[shard].numpy().data[offset : offset + data.nbytes] = data.cast("B")

    def tensor(self, shard: int, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return a view of a shard as a tensor; it shares the shard's memory."""
        return self._shards[shard][offset : offset + nbytes].view(dtype).view(shape)


def merge_to_state_dict(plan: Plan, *, allow_nonfinite: bool = False) -> dict[str, Tensor]:
    """Run a plan without writing anything to disk.

    Args:
        plan: From `build_plan`.
        allow_nonfinite: Merge NaN and infinity instead of raising an error.

    Returns:
        The tensors by name, on the CPU, bit for bit what `run_plan` would write.

    Raises:
        CheckpointError: An input is damaged or not finite, or integer buffers differ.
    """
    memory = _Memory(plan)
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
    if plan.compiled:
        prepare_compiler_cache()

    def done(state: GroupState, task: Task, result: Done) -> None:
        schedule.done(state, task, result.sums)

    with Reader() as reader:
        contexts = [
            Context(reader, memory, device, lambda *_: None, lambda: schedule.stopping, allow_nonfinite)
            for device in devices
        ]
        work_on_threads(schedule, contexts, kernels, plan.workers, done)
    if schedule.error is not None:
        raise schedule.error
    return {
        t.name: memory.tensor(t.shard, t.offset, t.nbytes, getattr(torch, t.dtype.name), t.shape) for t in plan.tensors
    }


def merge_state_dicts(
    method: str,
    models: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory, on their device, for example to average checkpoints in a training loop.

        averaged = merganser.merge_state_dicts("linear", [a.state_dict(), b.state_dict()], weight=1.0)

    Args:
        method: Name of a merge method.
        models: The state dicts, with the same names and shapes.
        base: State dict of the base, where the method takes one.
        seed: Seed of random draws.
        dtype: Dtype of the merged tensors; by default the promoted dtype of a tensor's inputs.
        **parameters: Parameters as in recipes (`lambda_` for `lambda`); a list gives one value per model.

    Returns:
        New tensors under the same names. Integer and boolean tensors are copied from the first input.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
        CheckpointError: Names or shapes differ, or values of integer or boolean tensors do.
        UnsupportedError: The parameters ask for a statistic over the whole model.
    """
    import torch

    from ..anatomy import infer_anatomy
    from ..errors import CheckpointError, UnsupportedError
    from ..method.method import fill
    from ..method.registry import get_method
    from .alignment.alignment import location_of
    from .kernels.merge_tensor import merge_tensor

    found = get_method(method)
    if found.from_data:
        raise UnsupportedError(
            f"{method}: needs statistics from data ({', '.join(found.from_data)}), which belong to checkpoints; merge these"
        )
    everything = [*models] if base is None else [base, *models]
    if not everything:
        raise ValueError(f"{method} takes {found.models_text()}, got no models")
    settings = {name.rstrip("_"): value for name, value in parameters.items()}
    filled = fill(found, settings, len(models))
    for name, statistic in found.statistics.items():
        if statistic.wanted(filled) and statistic.where(filled) == "model":
            raise UnsupportedError(f"{method}: {name} is measured over the whole model; merge checkpoints instead")
    names = everything[0].keys()
    for position, other in enumerate(everything):
        if other.keys() != names:
            odd = sorted(other.keys() ^ names)
            raise CheckpointError(f"state dict {position}: different names: {', '.join(odd[:4])}")
    merged: dict[str, Tensor] = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in everything[0].items()}
    anatomy = infer_anatomy(shapes, {})
    with torch.no_grad():
        for name in names:
            inputs = [state[name] for state in everything]
            if any(tensor.shape != inputs[0].shape for tensor in inputs):
                raise CheckpointError(f"{name}: shapes differ: {', '.join(str(list(t.shape)) for t in inputs)}")
            if any(not tensor.is_floating_point() for tensor in inputs):
                merged[name] = _copy_equal(name, inputs)
                continue
            start, own = (None, inputs) if base is None else (inputs[0], inputs[1:])
            merged[name] = merge_tensor(
                found,
                start,
                own,
                settings,
                name=name,
                role=anatomy.parts[name].role,
                location=location_of(name, anatomy),
                seed=seed,
                dtype=dtype,
            )
    return merged


def _copy_equal(name: str, inputs: Sequence[Tensor]) -> Tensor:
    """Copy an integer or boolean tensor; all models must have the same values."""
    import torch

    from ..errors import CheckpointError

    first = inputs[0]
    dtypes = dict.fromkeys(str(tensor.dtype) for tensor in inputs)
    if len(dtypes) > 1:
        raise CheckpointError(f"{name}: whole numbers are copied when equal, dtype included; got {', '.join(dtypes)}")
    if any(not torch.equal(first, other) for other in inputs[1:]):
        raise CheckpointError(f"{name}: this buffer of {first.dtype} differs between the models")
    return first.clone()
