"""Match the inputs' tensors, and decide how each tensor of the output is merged; where it is stored is decided later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...checkpoint import DTYPE_BY_NAME, DType, TensorInfo
from ...errors import CheckpointError, ParameterError, RecipeError
from ...method import MergeMethod
from ...recipe import Inputs, ModelReference, Recipe, Resolver, Source, check_layer_ranges
from ..alignment.alignment import Alignment, Member, Slot
from ..alignment.modules import align_modules, differ_in_modules
from ..alignment.slices import align_slices
from ..alignment.whole_models import align_models
from ..kernels.assignment import Treatment, treat, untouched
from ..kernels.blocks import BLOCK
from ..plan.from_data import DataOfModels, open_data, with_data
from ..plan.part import treatment_hash
from ..plan.sections.permutation import Permutation
from ..plan.tensor import PlannedTensor

__all__ = ["plan_tensors", "promote"]

_FLOAT32, _FLOAT64 = DTYPE_BY_NAME["float32"], DTYPE_BY_NAME["float64"]


def _align(recipe: Recipe, resolver: Resolver, members: Mapping[ModelReference, Member]) -> Alignment:
    donor = members[recipe.donor]
    if recipe.modules or (recipe.models and differ_in_modules(list(members.values()))):
        return align_modules(recipe, [resolver.sources(i) for i in range(len(resolver.slices))], donor, members)
    if not recipe.slices:
        return align_models(recipe, donor, [members[source.model] for source in _all(resolver.sources(0))])
    stacked = {reference: member.anatomy.n_layers for reference, member in members.items() if member.anatomy.main}
    check_layer_ranges(recipe, stacked)
    slices = [_layer_ranges(resolver.sources(i)) for i in range(len(resolver.slices))]
    return align_slices(recipe, slices, donor, members)


def _all(inputs: Inputs) -> tuple[Source, ...]:
    return inputs.models if inputs.base is None else (inputs.base, *inputs.models)


def _layer_ranges(inputs: Inputs) -> dict[ModelReference, range]:
    return {source.model: range(*source.layer_range) for source in _all(inputs) if source.layer_range}


def plan_tensors(
    recipe: Recipe,
    resolver: Resolver,
    members: Mapping[ModelReference, Member],
    permutation: Permutation | None,
    measured: bool,
) -> tuple[Alignment, list[PlannedTensor], list[DataOfModels]]:
    """Match the inputs' tensors, and decide how each tensor of the output is merged, with which statistics from data."""
    if resolver.method.sidecar is not None and recipe.unmatched != "refuse":
        raise RecipeError(
            f"{recipe.place_of('unmatched')}: {resolver.method.name} stores what restores each model, so all models "
            f"must hold the same tensors, got {recipe.unmatched!r}; only 'refuse' is possible"
        )
    alignment = _align(recipe, resolver, members)
    if resolver.method.data_inputs != "own" and recipe.slices:
        raise RecipeError(
            f"{recipe.place_of('slices')}: {resolver.method.name} measures and merges whole models block by block; give "
            "models in place of slices"
        )
    numbers = _numbers(alignment, resolver) if measured else [{}] * len(resolver.slices)
    drafts = [_draft(slot, recipe, resolver, numbers[slot.slice_index]) for slot in alignment.slots]
    _check_any(recipe, resolver.method, drafts)
    _check_whole_model(recipe, resolver.method, drafts)
    if not measured:
        return alignment, drafts, []
    data = [open_data(resolver.method, resolver.sources(i)) for i in range(len(resolver.slices))]
    if data[0] is not None:
        data[0].check_merge(treatment_hash(drafts, permutation))
    slices = (slot.slice_index for slot in alignment.slots)
    drafts = [with_data(draft, data[index]) for draft, index in zip(drafts, slices, strict=True)]
    if resolver.method.from_data and not any(draft.data for draft in drafts):
        raise RecipeError(
            f"{recipe.place}: the statistics from data cover none of the tensors that {resolver.method.name} merges; were "
            "they computed for these models?"
        )
    return alignment, drafts, [each for each in data if each is not None]


def _numbers(alignment: Alignment, resolver: Resolver) -> list[Mapping[str, Any]]:
    """Return the numbers from data that the method takes, for each slice."""
    found: list[Mapping[str, Any]] = []
    for index in range(len(resolver.slices)):
        data = open_data(resolver.method, resolver.sources(index)) if resolver.method.numbers else None
        slots = [slot for slot in alignment.slots if slot.slice_index == index]
        layers = [
            {
                slot.inputs[source.model].name_in_model: slot.location.layer
                for slot in slots
                if source.model in slot.inputs
            }
            for source in ([] if data is None else data.sources)
        ]
        found.append({} if data is None else data.numbers_of(layers))
    return found


def _draft(slot: Slot, recipe: Recipe, resolver: Resolver, numbers: Mapping[str, Any]) -> PlannedTensor:
    """Decide dtype, inputs, method and parameters of one tensor; data, shard and offset are set later."""
    given = resolver.sources(slot.slice_index)
    inputs = list(slot.inputs.values())
    if not slot.kept and list(slot.inputs) != given.references:
        inputs = [slot.inputs[reference] for reference in given.references]
    with_base = given.base is not None and not slot.kept
    base: TensorInfo | None = inputs[0] if with_base else None
    models: Sequence[TensorInfo] = inputs[1:] if with_base else inputs
    dtype, shape = inputs[0].dtype, inputs[0].shape
    copy = dtype.kind != "float"
    treatment = untouched() if slot.kept else Treatment(resolver.method, {})
    if not copy:
        declared = recipe.declared_dtype
        dtype = DTYPE_BY_NAME[declared] if declared else promote([tensor.natural or tensor.dtype for tensor in inputs])
    if not copy and not slot.kept:
        treatment = _treatment(slot, recipe, resolver, numbers, inputs, with_base=with_base)
        base, models = treatment.inputs(base, models)
    wide = recipe.dtype == "float64" or dtype is _FLOAT64 or _FLOAT64 in [tensor.dtype for tensor in inputs]
    return PlannedTensor(
        name=slot.name,
        dtype=dtype,
        compute_dtype=_FLOAT64 if wide else _FLOAT32,
        shape=shape,
        copy=copy,
        method=treatment.method,
        base=base,
        models=tuple(models),
        parameters=treatment.parameters,
        located=treatment.located,
        layer=slot.part.layer,
        role=slot.part.role,
        shard=0,
        offset=0,
        nbytes=dtype.nbytes(math.prod(shape)),
        block_limit=BLOCK,
    )


def _treatment(
    slot: Slot,
    recipe: Recipe,
    resolver: Resolver,
    numbers: Mapping[str, Any],
    inputs: Sequence[TensorInfo],
    *,
    with_base: bool,
) -> Treatment:
    """Return by which method and with which parameters a tensor is merged; its `inputs` begin with the base, if it has one.

    Raises:
        ParameterError: A parameter is not valid for this tensor.
    """
    models = inputs[1:] if with_base else inputs
    # a slice's layers have other names in the models, and filters match those; else filters match `rule`
    sliced = bool(recipe.slices) and slot.part.layer is not None
    names = [tensor.name for tensor in models] if sliced else [slot.rule] * len(models)
    parameters = resolver.parameters(slot.slice_index, slot.rule, names, slot.t)
    try:
        return treat(
            resolver.method,
            parameters,
            name=slot.name,
            shape=inputs[0].shape,
            role=slot.part.role,
            location=slot.location,
            n_models=len(models),
            based=with_base,
            numbers=numbers,
        )
    except ParameterError as error:
        raise ParameterError(f"{resolver.slices[slot.slice_index].place}: {error}") from None


def promote(dtypes: Sequence[DType]) -> DType:
    """Return the float dtype to which all of these promote."""
    if dtypes.count(dtypes[0]) == len(dtypes):
        return dtypes[0]
    return _FLOAT64 if _FLOAT64 in dtypes else _FLOAT32


def _check_any(recipe: Recipe, method: MergeMethod, drafts: Sequence[PlannedTensor]) -> None:
    """Refuse an output without tensors, and sidecars of models of which no tensor is merged."""
    if not drafts:
        raise CheckpointError(f"{recipe.place}: the output would hold no tensor: none is in all models in one shape")
    if method.sidecar is not None and all(draft.copy for draft in drafts):
        raise CheckpointError(
            f"{recipe.place}: {method.name} stores what restores each model, and there is nothing to store: no tensor is "
            "merged, all are buffers of whole numbers that are copied"
        )


def _check_whole_model(recipe: Recipe, method: MergeMethod, drafts: Sequence[PlannedTensor]) -> None:
    """Raise RecipeError if a statistic over the whole model has tensors with different parameters."""
    merged = {id(draft.parameters): draft for draft in drafts if not draft.copy and draft.method is method}
    if len(merged) < 2:
        return
    first, other, *_ = merged.values()
    for name, statistic in method.statistics.items():
        if any(statistic.wanted(d.parameters) and statistic.where(d.parameters) == "model" for d in merged.values()):
            raise RecipeError(
                f"{recipe.place}: {method.name} measures {name} over the whole model, so its parameters cannot "
                f"differ between tensors; give {first.name} and {other.name} the same"
            )
