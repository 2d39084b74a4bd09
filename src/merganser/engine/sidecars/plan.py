"""Plan where every byte of the sidecars goes, from file headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...checkpoint import DTYPE_BY_NAME, DType, Shard, TensorInfo, plan_shards
from ...errors import RecipeError
from ...method import MergeMethod, Part, applies, takes
from ...recipe import Recipe, Resolver, Source
from ..plan.sections.sidecars import FOLDER, SHARED, PlannedTask, SidecarPlan
from ..plan.tensor import holds
from .codec import OWN, Codec, Codecs, keeps, sidecar_of

if TYPE_CHECKING:
    from ..plan.tensor import PlannedTensor

_RESERVED = ("index.json", "shared")
_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]+")


def stored_name(tensor: str, part: str) -> str:
    """Return the name of a part in its file."""
    return f"{tensor}.{part}"


def plan_sidecars(
    resolver: Resolver, tensors: Sequence[PlannedTensor], shard_bytes: int, *, threads: int, max_memory: int
) -> SidecarPlan | None:
    """Plan the sidecars of a merge.

    Args:
        resolver: The recipe and its method.
        tensors: Tensors of the merged model.
        shard_bytes: Largest size of a file, bytes.
        threads: Threads that make them; fewer are used if memory does not suffice.
        max_memory: Memory left for making them, bytes.

    Returns:
        The plan; None if the method has no sidecar.

    Raises:
        RecipeError: The recipe stacks slices, has an invalid task name, or has different parameters for a statistic
            over the whole model.
    """
    recipe, method = resolver.recipe, resolver.method
    if method.sidecar is None:
        return None
    if recipe.slices:
        raise RecipeError(
            f"{recipe.place_of('slices')}: {method.name} stores what restores each model, so it takes whole models; "
            "write 'models'"
        )
    sources = resolver.sources(0).models
    names = task_names(sources)
    codecs = Codecs(method, len(names))
    kept = {t.name: found for t in tensors if (found := _kept(method, t)) is not None}
    treated = [t for t in tensors if t.name not in kept]
    _check_over_model(recipe, codecs, treated)
    stored = _stored_tensors(codecs, tensors, kept, len(names))
    shards: list[Shard] = []
    owners: list[int] = []
    for owner, parts in stored.items():
        if parts or owner != SHARED:
            folder = f"{FOLDER}/{names[owner]}" if owner != SHARED else FOLDER
            files = plan_shards(parts, shard_bytes, {}, stem=f"{folder}/{'shared' if owner == SHARED else 'parts'}")
            shards += files
            owners += [owner] * len(files)
    needed = sidecar_memory(method, tensors)
    workers = min(max(max_memory // max(needed, 1), 1), threads)
    sizes = [sum(s.size for s, owner in zip(shards, owners, strict=True) if owner == i) for i in range(len(names))]
    return SidecarPlan(
        tasks=tuple(
            PlannedTask(name, source.model, sizes[i], sum(t.models[i].nbytes for t in tensors if holds(t, i)))
            for i, (name, source) in enumerate(zip(names, sources, strict=True))
        ),
        shards=tuple(shards),
        owners=tuple(owners),
        kept=kept,
        needs_base=any(needs_base(method, t.parameters) for t in treated),
        workers=workers,
        peak_memory=workers * needed,
        bytes_read=_bytes_read(codecs, tensors, kept),
    )


def needs_base(method: MergeMethod, parameters: Mapping[str, object]) -> bool:
    """Return whether restoring a tensor from parts with these parameters needs the base."""
    sidecar = sidecar_of(method)
    return "base" in takes(sidecar.decode) and applies(sidecar.base, parameters)


def is_folder_name(name: str) -> bool:
    """Return whether a task can have this name: a valid folder name on every system, and not hidden."""
    return bool(name) and _UNUSUAL.search(name) is None and name[0] not in ".-"


def task_names(sources: Sequence[Source]) -> list[str]:
    """Return the tasks' names: those in the recipe, else the names of the models' folders, made unique.

    Raises:
        RecipeError: A name in the recipe is used twice, or is not a valid folder name.
    """
    taken = {name.lower() for name in _RESERVED}
    for source in sources:
        if source.name is None:
            continue
        where = f"{source.place}: name {source.name!r}"
        if not is_folder_name(source.name):
            raise RecipeError(f"{where} must be usable as the name of a folder: letters, digits, '.', '_' and '-'")
        if source.name.lower() in taken:
            reason = "is kept for a file of the sidecars" if source.name.lower() in _RESERVED else "is given twice"
            raise RecipeError(f"{where} {reason}; choose another")
        taken.add(source.name.lower())
    return [source.name or _unique(source, taken) for source in sources]


def _unique(source: Source, taken: set[str]) -> str:
    last = source.model.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    stem = _UNUSUAL.sub("-", last).strip(".-") or "task"
    name, number = stem, 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.lower())
    return name


def _kept(method: MergeMethod, tensor: PlannedTensor) -> str | None:
    if tensor.copy:
        return "merged"
    return keeps(method, tensor.parameters, tensor.name, tensor.shape, tensor.role)


def _check_over_model(recipe: Recipe, codecs: Codecs, tensors: Sequence[PlannedTensor]) -> None:
    """Raise RecipeError if a statistic over the whole model has tensors with different parameters."""
    by_parameters = {id(t.parameters): t for t in tensors}
    if len(by_parameters) < 2:
        return
    first, other, *_ = by_parameters.values()
    for tensor in by_parameters.values():
        for name, _, over in codecs.of(tensor.parameters, tensor.shape).statistics:
            if over == "model":
                raise RecipeError(
                    f"{recipe.place}: {recipe.merge_method} measures {name} over the whole model, so its parameters cannot "
                    f"differ between tensors; give {first.name} and {other.name} the same"
                )


_Stored = tuple[str, DType, tuple[int, ...]]


def _stored_tensors(
    codecs: Codecs, tensors: Sequence[PlannedTensor], kept: Mapping[str, str], n_models: int
) -> dict[int, list[_Stored]]:
    """Return the tensors to store, by owner."""
    stored: dict[int, list[_Stored]] = {owner: [] for owner in (SHARED, *range(n_models))}
    for tensor in tensors:
        owners = [i for i in range(n_models) if holds(tensor, i)]
        if tensor.name in kept:
            if kept[tensor.name] == OWN:
                for i in owners:
                    stored[i].append((stored_name(tensor.name, OWN), tensor.models[i].dtype, tensor.shape))
            continue
        for name, part in codecs.of(tensor.parameters, tensor.shape).all_parts.items():
            own_name = stored_name(tensor.name, name)
            for i in [SHARED] if part.shared else owners:
                stored[i].append(
                    (own_name, part_dtype(part, tensor.dtype if i < 0 else tensor.models[i].dtype), part.shape)
                )
    return stored


def part_dtype(part: Part, own: DType) -> DType:
    """Return the stored dtype of a part, given the dtype of its tensor."""
    return own if part.dtype is None else DTYPE_BY_NAME[part.dtype]


def sidecar_memory(method: MergeMethod, tensors: Sequence[PlannedTensor]) -> int:
    """Return the memory of one thread that makes sidecars, bytes; 0 if the method has none."""
    if method.sidecar is None:
        return 0
    treated = [tensor for tensor in tensors if _kept(method, tensor) is None]
    codecs = Codecs(method, max((len(tensor.models) for tensor in treated), default=0))
    return max((_held(codecs.of(t.parameters, t.shape), t) for t in treated), default=0)


def _held(codec: Codec, tensor: PlannedTensor) -> int:
    """Return the memory for a tensor's largest block, bytes, from measurements of the built-in methods."""
    n_models = len(tensor.models)
    block = codec.largest_block
    if codec.sidecar.scope == "matrix":
        stored = sum(
            math.prod(part.shape) * (1 if part.shared else n_models) for part in codec.parts(block.shape).values()
        )
        needed = 70 * (block.end - block.start) + 6 * stored
    else:
        needed = (64 + 10 * n_models) * (block.end - block.start)
    return needed * tensor.compute_dtype.itemsize // 4


def _bytes_read(codecs: Codecs, tensors: Sequence[PlannedTensor], kept: Mapping[str, str]) -> int:
    """Return the bytes read to make sidecars: all inputs per measuring round and to encode, models again to compare."""
    total = 0
    for tensor in tensors:
        if tensor.copy:
            continue
        models = sum(t.nbytes for t in tensor.models)
        once = models + tensor.nbytes + _nbytes(tensor.base)
        if tensor.name in kept:
            total += once
            continue
        codec = codecs.of(tensor.parameters, tensor.shape)
        total += (1 + sum(len(s.rounds) for _, s, _ in codec.statistics)) * once + models
    return total


def _nbytes(tensor: TensorInfo | None) -> int:
    return 0 if tensor is None else tensor.nbytes
