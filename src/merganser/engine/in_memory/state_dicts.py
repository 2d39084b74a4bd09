"""Merge state dicts in memory, for example in a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...anatomy import infer_anatomy
from ...checkpoint.wrappers import unwrapped_names
from ...errors import CheckpointError, ParameterError, UnsupportedError
from ...method.method import MergeMethod, fill
from ...method.registry import get_method
from ..alignment.alignment import location_of
from ..kernels.merge_tensor import merge_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Integers = Literal["equal", "largest", "first"]
State = Mapping[str, Tensor]

_COUNTER = "num_batches_tracked"
"""BatchNorm's count of the batches seen; it says nothing about the weights, and differs between any two models."""


def merge_state_dicts(
    method: str,
    models: Iterable[State | nn.Module],
    *,
    base: State | nn.Module | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    integers: Integers = "equal",
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory, on their device, for example to average checkpoints in a training loop.

        averaged = merganser.merge_state_dicts("linear", [a.state_dict(), b.state_dict()], weight=1.0)

    Names are compared without the prefixes of training frameworks (`module.`, `_orig_mod.`, FSDP's). DTensors, as FSDP2
    shards them, are merged shard by shard where each element depends on its own inputs alone; otherwise one tensor at a
    time is gathered, and every rank must make the call.

    Args:
        method: Name of a merge method.
        models: The state dicts, or modules, with the same names and shapes; also as a generator, all of whose state
            dicts are held at once. `Average` adds up one after another.
        base: State dict of the base, where the method takes one.
        seed: Seed of random draws.
        dtype: Dtype of the merged tensors; by default the promoted dtype of a tensor's inputs.
        integers: What happens to tensors of integers or booleans: they must be "equal", or the "largest" value or the
            "first" model's is taken. The counters of BatchNorm (`num_batches_tracked`) may always differ; unless
            "first" is asked for, the largest is taken.
        **parameters: Parameters as in recipes (`lambda_` for `lambda`); a list gives one value per model.

    Returns:
        New tensors under the names of the first model, sharded like its tensors.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
        CheckpointError: Names or shapes differ, or values of integer or boolean tensors do.
        UnsupportedError: The parameters ask for a statistic over the whole model.
        TypeError: Something is neither a state dict nor a module.
    """
    if not isinstance(method, str):
        raise TypeError(
            f"merge_state_dicts: the first argument is the name of a method, got {type(method).__name__}: "
            "merge_state_dicts('linear', models)"
        )
    merge_method = get_method(method)
    if merge_method.from_data:
        raise UnsupportedError(
            f"{method}: needs statistics from data ({', '.join(merge_method.from_data)}), which belong to checkpoints; "
            "merge these"
        )
    if integers not in ("equal", "largest", "first"):
        raise ParameterError(f"integers must be 'equal', 'largest' or 'first', got {integers!r}")
    given = _as_list(models)
    states = [state_dict_of(model, f"model {i + 1}") for i, model in enumerate(given)]
    if base is not None:
        states.insert(0, state_dict_of(base, "base"))
    if not states:
        raise ValueError(f"{method} takes {merge_method.models_text()}, got no models")
    settings = {name.rstrip("_"): value for name, value in parameters.items()}
    filled = fill(merge_method, settings, len(given))
    for name, statistic in merge_method.statistics.items():
        if statistic.wanted(filled) and statistic.where(filled) == "model":
            raise UnsupportedError(f"{method}: {name} is measured over the whole model; merge checkpoints instead")
    names, bare = _same_names(states, with_base=base is not None)
    anatomy = infer_anatomy({name: tuple(tensor.shape) for name, tensor in bare[0].items()}, {})
    with torch.no_grad():
        return {
            names[name]: _merge_one(
                merge_method,
                [state[name] for state in bare],
                settings,
                filled,
                integers,
                with_base=base is not None,
                name=name,
                role=anatomy.parts[name].role,
                location=location_of(name, anatomy),
                seed=seed,
                dtype=dtype,
            )
            for name in bare[0]
        }


def _merge_one(
    method: MergeMethod,
    inputs: Sequence[Tensor],
    settings: Mapping[str, Any],
    filled: Mapping[str, Any],
    integers: Integers,
    *,
    with_base: bool,
    name: str,
    **where: Any,
) -> Tensor:
    if any(tensor.shape != inputs[0].shape for tensor in inputs):
        raise CheckpointError(f"{name}: shapes differ: {', '.join(str(list(t.shape)) for t in inputs)}")
    if any(not tensor.is_floating_point() for tensor in inputs):
        return _merge_integers(name, inputs, integers)
    sharded = _Sharded.of(name, inputs)
    parts = inputs if sharded is None else sharded.parts(inputs, method, filled)
    base, models = (parts[0], parts[1:]) if with_base else (None, parts)
    merged = merge_tensor(method, base, models, settings, name=name, **where)
    return merged if sharded is None else sharded.joined(merged)


def state_dict_of(model: object, which: str) -> State:
    """Return the state dict of a module, or the state dict itself.

    Args:
        model: A module, or a mapping of names to tensors.
        which: The model, for messages.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(model, nn.Module):
        return model.state_dict()
    if not isinstance(model, Mapping):
        raise TypeError(f"{which}: expected a state dict (names to tensors) or a module, got {type(model).__name__}")
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            nested = f"; pass what is under {name!r}" if isinstance(tensor, Mapping) else ""
            raise TypeError(f"{which}: expected names to tensors, got {type(tensor).__name__} for {name!r}{nested}")
    return model


def _as_list(models: object) -> list[object]:
    if isinstance(models, Mapping | nn.Module):
        raise TypeError("models: expected a list of state dicts, got one; put it into a list")
    if not isinstance(models, Iterable):
        raise TypeError(f"models: expected a list of state dicts, got {type(models).__name__}")
    return list(models)


def _same_names(states: Sequence[State], *, with_base: bool) -> tuple[dict[str, str], list[dict[str, Tensor]]]:
    """Return the state dicts by names without prefixes of frameworks, and the names in the first model by those.

    Raises:
        CheckpointError: Their names differ.
    """
    unwrapped = [unwrapped_names(f"state dict {position}", state)[0] for position, state in enumerate(states)]
    first = unwrapped[1 if with_base and len(states) > 1 else 0]
    for position, names in enumerate(unwrapped):
        odd = sorted({*names.values()} ^ {*first.values()})
        if odd:
            raise CheckpointError(f"state dict {position}: different names: {', '.join(odd[:4])}")
    return (
        {new: name for name, new in first.items()},
        [{new: state[name] for name, new in names.items()} for state, names in zip(states, unwrapped, strict=True)],
    )


def _merge_integers(name: str, inputs: Sequence[Tensor], rule: Integers) -> Tensor:
    """Merge a tensor of integers or booleans, such as a counter, a buffer of indices or a mask."""
    first = inputs[0]
    dtypes = dict.fromkeys(str(tensor.dtype) for tensor in inputs)
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{name}: integers are not averaged, and their dtypes must be equal; got {', '.join(dtypes)}"
        )
    if rule == "first":
        return first.clone()
    if rule == "largest" or name.rpartition(".")[2] == _COUNTER:
        largest = first
        for other in inputs[1:]:
            largest = torch.maximum(largest, other)
        return largest.clone()
    if any(not torch.equal(first, other) for other in inputs[1:]):
        raise CheckpointError(
            f"{name}: this buffer of {first.dtype} differs between the models; integers='largest' or 'first' chooses"
        )
    return first.clone()


class _Sharded:
    """How the DTensors of one name are spread over the ranks, and whether their parts are merged or the whole."""

    def __init__(self, like: DTensor) -> None:
        self._like = like
        self._local = False

    @classmethod
    def of(cls, name: str, inputs: Sequence[Tensor]) -> _Sharded | None:
        """Return how the inputs are sharded, or None if they are ordinary tensors.

        Raises:
            CheckpointError: Only some are sharded, or not all in the same way.
        """
        if not torch.distributed.is_available():
            return None
        from torch.distributed.tensor import DTensor

        sharded = [tensor for tensor in inputs if isinstance(tensor, DTensor)]
        if not sharded:
            return None
        if len(sharded) < len(inputs):
            raise CheckpointError(f"{name}: some models have a DTensor, others an ordinary tensor; shard or gather all")
        like = sharded[0]
        for other in sharded[1:]:
            if other.device_mesh != like.device_mesh or other.placements != like.placements:
                raise CheckpointError(
                    f"{name}: sharded differently: {like.placements} on {like.device_mesh}, "
                    f"{other.placements} on {other.device_mesh}"
                )
        return cls(like)

    def parts(self, inputs: Sequence[Any], method: MergeMethod, parameters: Mapping[str, Any]) -> list[Tensor]:
        """Return what is merged on this rank: its shards, or the gathered tensors."""
        partial = any(placement.is_partial() for placement in self._like.placements)
        self._local = method.together(parameters) == "joined" and not partial
        return [tensor.to_local() if self._local else tensor.full_tensor() for tensor in inputs]

    def joined(self, merged: Tensor) -> Tensor:
        """Return the merged tensor, sharded like the inputs."""
        from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

        like = self._like
        if self._local:
            stride = torch.empty(like.shape, device="meta").stride()
            return DTensor.from_local(
                merged, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
            )
        placements = [Replicate() if placement.is_partial() else placement for placement in like.placements]
        return distribute_tensor(merged, like.device_mesh, placements)
