"""The Python interface: what the command line calls, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .engine.plan import Plan
    from .engine.run import Progress, Result

_Source = Recipe | str | Path | Mapping[str, Any]


def plan(recipe: _Source, **options: Any) -> Plan:
    """Plan a merge from the headers of its inputs; nothing is written.

    Args:
        recipe: A recipe, the path of one, its YAML text, or the same as a mapping.
        **options: As for `merganser.engine.planning.build_plan`: `seed`, `out_shard_size`, `threads`, `device`,
            `max_memory`, `cache_dir`, `compiled`.

    Raises:
        MergeError: The recipe or its inputs cannot be merged; the message says why.
    """
    from .engine.planning import build_plan

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if loaded.random_seed is not None:
        options.setdefault("seed", loaded.random_seed)
    return build_plan(loaded, **options)


def merge(
    recipe: _Source,
    out: str | Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    allow_nonfinite: bool = False,
    cluster: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Merge models into a new checkpoint.

    Args:
        recipe: A recipe, the path of one, its YAML text, or the same as a mapping.
        out: Target folder; it appears, complete, when the merge is done.
        overwrite: Replace a target that merganser wrote before.
        fresh: Start again even where an interrupted run could be continued.
        allow_nonfinite: Merge NaN and infinity instead of refusing them.
        cluster: Address of a Ray cluster whose nodes share storage with this machine; None: work here.
        progress: Told how the run advances.
        **options: As for `plan`.

    Returns:
        The folder and the run record.

    Raises:
        MergeError: The recipe, an input or the target is at fault; the message says why.
    """
    from .engine.run import run_plan

    return run_plan(
        plan(recipe, **options),
        Path(out),
        overwrite=overwrite,
        fresh=fresh,
        allow_nonfinite=allow_nonfinite,
        cluster=cluster,
        progress=progress,
    )


def merge_state_dicts(
    method: str,
    models: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge state dicts in memory, on the device that they are on; for souping inside a training loop.

        averaged = merganser.merge_state_dicts("linear", [a.state_dict(), b.state_dict()], weight=1.0)

    Args:
        method: Name of a merge method.
        models: The state dicts, with the same names and shapes.
        base: State dict of the base, where the method takes one.
        seed: Seed of random draws.
        dtype: Dtype of the merged tensors; by default what the inputs of each promote to.
        **parameters: As in recipes (`lambda_` for `lambda`); a list gives one value per model.

    Returns:
        New tensors under the same names. Whole numbers and flags are copied from the first input.

    Raises:
        ParameterError: A parameter is unknown, missing, out of range or of the wrong count.
        CheckpointError: Names or shapes differ, or buffers of whole numbers do.
        UnsupportedError: The parameters ask for a statistic over the whole model.
    """
    import torch

    from .anatomy import infer_anatomy
    from .engine.align import location_of
    from .engine.blocks import fill, merge_tensors
    from .errors import CheckpointError, UnsupportedError
    from .registry import get_method

    found = get_method(method)
    settings = {name.rstrip("_"): value for name, value in parameters.items()}
    filled = fill(found, settings, len(models))
    for name, statistic in found.statistics.items():
        if statistic.wanted(filled) and filled.get(statistic.over, statistic.over) == "model":
            raise UnsupportedError(f"{method}: {name} is measured over the whole model; merge checkpoints instead")
    everything = [*models] if base is None else [base, *models]
    if not everything:
        raise ValueError(f"{method} takes {found.models_text()}, got no models")
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
            merged[name] = merge_tensors(
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
    """Copy a buffer of whole numbers or flags that all models agree on."""
    import torch

    from .errors import CheckpointError

    first = inputs[0]
    dtypes = dict.fromkeys(str(tensor.dtype) for tensor in inputs)
    if len(dtypes) > 1:
        raise CheckpointError(f"{name}: whole numbers are copied when equal, dtype included; got {', '.join(dtypes)}")
    if any(not torch.equal(first, other) for other in inputs[1:]):
        raise CheckpointError(f"{name}: this buffer of {first.dtype} differs between the models")
    return first.clone()
