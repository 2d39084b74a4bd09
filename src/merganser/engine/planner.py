"""Plan a merge: read the inputs' headers, match their tensors, decide how and where each output tensor is merged."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import open_model
from ..anatomy import set_config_dtype, set_tied, slice_config
from ..anatomy.config import unquantised
from ..anatomy.module_config import slice_module_config
from ..checkpoint import DTYPE_BY_NAME, Checkpoint, DType, TensorInfo, plan_shards
from ..checkpoint.folder import WEIGHTS_KEY
from ..errors import CheckpointError, MergeError, ParameterError, RecipeError
from ..method import MergeMethod
from ..recipe import Inputs, ModelReference, Recipe, Resolver, Source, check_layer_ranges, check_recipe
from .agreement.configs import compare_configs
from .agreement.ending import Ending, agree_on_ending
from .agreement.quantisation import check_quantised, refuse_unreadable
from .agreement.side_files import chat_template, file_origins, side_file_warnings, side_files, unread_warnings
from .agreement.vocabularies import compare_tokens
from .alignment.alignment import Alignment, Member, Slot
from .alignment.complete import check_complete
from .alignment.leftovers import without_leftovers
from .alignment.loadable import check_layers_load
from .alignment.modules import align_modules, as_language_parts, differ_in_modules
from .alignment.renaming import named_alike
from .alignment.slices import align_slices
from .alignment.whole_models import align_models
from .census import take_census
from .fusion.machine import why_not
from .kernels.assignment import Treatment, treat, untouched
from .kernels.blocks import BLOCK
from .kernels.devices import resolve_devices
from .noise import noise_warnings
from .permutation.apply import permute_members
from .plan.float8 import quantise_output
from .plan.from_data import DataOfModels, check_weights, open_data, with_data
from .plan.memory import default_memory, estimate_memory, fit_workers, kept_memory
from .plan.part import place, treatment_hash
from .plan.plan import Plan
from .plan.tensor import PlannedTensor
from .sidecars.plan import plan_sidecars, sidecar_memory
from .vocabulary.match import Matched, match_vocabularies

if TYPE_CHECKING:
    import torch

Match = Callable[[Recipe, Mapping[ModelReference, Member], "Path | None"], Matched]

SHARD_BYTES = 5_000_000_000


def build_plan(
    recipe: Recipe,
    *,
    seed: int = 0,
    out_shard_size: int = SHARD_BYTES,
    threads: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    cache_dir: Path | None = None,
    match: Match = match_vocabularies,
    measured: bool = True,
    permutations: Path | None = None,
    unmade: Collection[str] = (),
) -> Plan:
    """Plan a merge from the headers of its inputs.

    Args:
        recipe: From `load_recipe`.
        seed: Seed of random draws.
        out_shard_size: Largest size of an output file, bytes.
        threads: Threads that merge; by default one per core, at most 8. Fewer are used if memory does not suffice.
        max_memory: Largest resident memory, bytes; by default a quarter of the machine's or container's, at most 4 GB.
        device: "cpu", "cuda" (every GPU), "cuda:1", "cuda:0,cuda:2", or "auto" (every GPU, else the CPU).
        cache_dir: Folder for models from the Hub.
        match: Gives the models of the recipe one vocabulary; another one than the default makes rows of new tokens in
            another way.
        measured: Whether the statistics from data that the method takes are there. If not, the plan is of the merge
            without them; `with_data` adds them.
        permutations: Folder that keeps the permutations of models that are aligned, until the merge is done.
        unmade: Paths of models whose weights an earlier stage has yet to make.

    Raises:
        RecipeError: The recipe does not fit the method or the models.
        CheckpointError: An input is missing, damaged, quantised, or does not fit the others.
        MemoryLimitError: The method cannot work within `max_memory`; the message says what it needs.
        UnsupportedError: There is no such device.
        ValueError: A number is below 1.
    """
    _check_options(out_shard_size, threads, max_memory)
    devices = resolve_devices(device)
    resolver = check_recipe(recipe)
    members, input_warnings = _open_all(recipe, cache_dir)
    check_quantised(recipe, {reference: member.checkpoint for reference, member in members.items()})
    matched = match(recipe, members, cache_dir)
    limit = max_memory or default_memory()
    members, permutation = permute_members(
        recipe, resolver.method, matched.members, folder=permutations, unmade=unmade, max_memory=limit
    )
    alignment, drafts, data = _drafts(recipe, resolver, members, measured)
    if recipe.check_statistics:
        check_weights(data, cache_dir)
    agreement = compare_configs(members[recipe.donor], members.values(), alignment)
    agreement += matched.warnings if matched.change else compare_tokens(recipe, members, matched.owner, alignment)
    config, config_warnings = _config(members[recipe.donor], alignment, drafts)
    drafts, config, quantise_warnings = quantise_output(recipe, drafts, config)
    shards = plan_shards([each for draft in drafts for each in draft.described], out_shard_size, {})
    template, template_of, template_warnings = chat_template(recipe, members, matched.owner)
    donor, owner = members[recipe.donor], matched.owner
    ending = agree_on_ending(donor, owner, config, template, matched.vocabulary, matched.moved)
    files = side_files(donor, owner, matched.change)
    fused, fusion_warnings = _fuses(drafts, devices)
    tensors = place(drafts, shards)
    wanted = threads or min(os.cpu_count() or 1, 8)
    keeps = all(found.type == "cpu" for found in devices)
    workers, kept, room = _share_memory(resolver.method, drafts, wanted, fused, limit, keeps=keeps)
    return Plan(
        recipe=recipe,
        method=resolver.method,
        checkpoints={reference: member.checkpoint for reference, member in members.items()},
        donor=recipe.donor,
        tensors=tensors,
        shards=shards,
        config=ending.config,
        side_files=files,
        origins=file_origins(donor, owner, files, _configs(ending), template_of, matched.change),
        chat_template=template,
        generation_config=ending.generation_config,
        fused=fused,
        seed=seed,
        block=BLOCK,
        workers=workers,
        kept=kept,
        max_memory=limit,
        device=",".join(str(found) for found in devices),
        warnings=[
            *resolver.warnings,
            *resolver.idle_filters(),
            *input_warnings,
            *noise_warnings({reference: member.checkpoint for reference, member in members.items()}, tensors),
            *unread_warnings(members),
            *alignment.warnings,
            *agreement,
            *config_warnings,
            *quantise_warnings,
            *template_warnings,
            *ending.warnings,
            *fusion_warnings,
        ],
        differences=resolver.differences(),
        vocabulary=matched.change,
        statistics=list({own.path: own for each in data for own in (*each.folders, *each.base_folders)}.values()),
        sidecars=plan_sidecars(resolver, tensors, out_shard_size, threads=wanted, max_memory=room),
        census=take_census(members, alignment, tensors),
        permutation=permutation,
    )


def _configs(ending: Ending) -> list[str]:
    """Return the names of the configs that are written, rather than copied."""
    written = {"config.json": ending.config, "generation_config.json": ending.generation_config}
    return [name for name, content in written.items() if content]


def _share_memory(
    method: MergeMethod, drafts: Sequence[PlannedTensor], wanted: int, fused: bool, limit: int, *, keeps: bool
) -> tuple[int, int, int]:
    """Return the number of workers, the bytes of inputs that each may cache, and the bytes left for making sidecars."""
    beside = sidecar_memory(method, drafts)
    workers = fit_workers(drafts, wanted, fused, limit, beside=beside)
    room = limit - estimate_memory(drafts, workers, fused)
    kept = kept_memory(drafts, workers, room - beside) if keeps else 0
    return workers, kept, room - workers * kept


def _check_options(out_shard_size: int, threads: int | None, max_memory: int | None) -> None:
    for name, value in (("out_shard_size", out_shard_size), ("threads", threads), ("max_memory", max_memory)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _open(recipe: Recipe, reference: ModelReference, cache_dir: Path | None) -> Checkpoint:
    """Open a checkpoint, with its adapter if it has one; errors get the place in the recipe that names it."""
    try:
        return open_model(
            reference.path,
            reference.lora,
            revision=reference.revision,
            adapter_revision=reference.lora_revision,
            cache_dir=cache_dir,
        )
    except MergeError as error:
        raise type(error)(f"{recipe.place_of_model(reference)}: {error}") from None


def _open_all(recipe: Recipe, cache_dir: Path | None) -> tuple[dict[ModelReference, Member], list[str]]:
    """Open every checkpoint; also return warnings about changed names and tensors left out."""
    members: dict[ModelReference, Member] = {}
    warnings: list[str] = []
    for reference in recipe.references():
        checkpoint = _open(recipe, reference, cache_dir)
        warnings += checkpoint.notes
        refuse_unreadable(recipe, reference, checkpoint)
        if checkpoint.wrappers:
            stripped = ", ".join(checkpoint.wrappers)
            warnings.append(
                f"{reference}: {stripped}: prefixes of a training framework, removed from the names of tensors"
            )
        checkpoint, left_out = without_leftovers(recipe, reference, checkpoint)
        warnings += left_out
        if members and (recipe.models or recipe.modules):
            checkpoint, old_names = named_alike(str(reference), checkpoint, members[recipe.donor].checkpoint)
            warnings += old_names
        members[reference] = Member.of(reference, checkpoint, list(members.values())[:1])
    members, matched = as_language_parts(members)
    return members, warnings + matched


def _fuses(drafts: Sequence[PlannedTensor], devices: Sequence[torch.device]) -> tuple[bool, list[str]]:
    """Return whether operations are fused, and a warning if they could be, but not here."""
    reason = why_not() if devices[0].type == "cpu" else None
    if reason is None or not any(draft.method.fuse and not draft.copy for draft in drafts):
        return reason is None, []
    return False, [f"{reason}: operations run one by one, several times slower"]


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


def _drafts(
    recipe: Recipe, resolver: Resolver, members: Mapping[ModelReference, Member], measured: bool
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
        data[0].check_merge(treatment_hash(drafts))
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
            {slot.inputs[source.model].name: slot.location.layer for slot in slots if source.model in slot.inputs}
            for source in ([] if data is None else data.sources)
        ]
        found.append({} if data is None else data.numbers_of(layers))
    return found


def _draft(slot: Slot, recipe: Recipe, resolver: Resolver, numbers: Mapping[str, Any]) -> PlannedTensor:
    """Decide dtype, inputs, method and parameters of one tensor; data, shard and offset are set later."""
    given = resolver.sources(slot.slice_index)
    base = slot.inputs[given.base.model] if given.base is not None and not slot.kept else None
    sources = slot.inputs if slot.kept else [source.model for source in given.models]
    models: Sequence[TensorInfo] = [slot.inputs[model] for model in sources]
    inputs = models if base is None else [base, *models]
    dtype, shape, role = inputs[0].dtype, inputs[0].shape, slot.part.role
    copy = dtype.kind != "float"
    treatment = untouched() if slot.kept else Treatment(resolver.method, {})
    if not copy:
        declared = recipe.out_dtype or recipe.dtype
        dtype = DTYPE_BY_NAME[declared] if declared else promote([tensor.natural or tensor.dtype for tensor in inputs])
    if not copy and not slot.kept:
        # a slice's layers have other names in the models, and filters match those; else filters match `rule`
        sliced = bool(recipe.slices) and slot.part.layer is not None
        names = [tensor.name if sliced else slot.rule for tensor in models]
        parameters = resolver.parameters(slot.slice_index, slot.rule, names, slot.t)
        try:
            treatment = treat(
                resolver.method,
                parameters,
                name=slot.name,
                shape=shape,
                role=role,
                location=slot.location,
                n_models=len(models),
                numbers=numbers,
            )
        except ParameterError as error:
            raise ParameterError(f"{resolver.slices[slot.slice_index].place}: {error}") from None
        base, models = treatment.inputs(base, models)
    wide = "float64" in (recipe.dtype, dtype.name, *(tensor.dtype.name for tensor in inputs))
    return PlannedTensor(
        name=slot.name,
        dtype=dtype,
        compute_dtype=DTYPE_BY_NAME["float64" if wide else "float32"],
        shape=shape,
        copy=copy,
        method=treatment.method,
        base=base,
        models=tuple(models),
        parameters=treatment.parameters,
        located=treatment.located,
        layer=slot.part.layer,
        role=role,
        shard=0,
        offset=0,
        nbytes=dtype.nbytes(math.prod(shape)),
        block_limit=BLOCK,
    )


def promote(dtypes: Sequence[DType]) -> DType:
    """Return the float dtype to which all of these promote."""
    names = {dtype.name for dtype in dtypes}
    if len(names) == 1:
        return dtypes[0]
    return DTYPE_BY_NAME["float64" if "float64" in names else "float32"]


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
                f"differ between tensors; they do between {first.name} and {other.name}"
            )


def _config(donor: Member, alignment: Alignment, drafts: Sequence[PlannedTensor]) -> tuple[dict[str, Any], list[str]]:
    """Return the output's config.json: the donor's with updated layers, tie and dtype; and warnings."""
    # drop the key for the weight file's name, as the output's files have standard names
    config = {key: value for key, value in donor.checkpoint.config.items() if key != WEIGHTS_KEY}
    shapes = {draft.name: draft.shape for draft in drafts}
    warnings: list[str] = []
    if donor.checkpoint.quantisation is not None:
        config = unquantised(config)
    if not config:
        others = ", and none of the other files in its folder" if donor.checkpoint.loose else ""
        warnings = [f"the donor has no config.json, so the output has none{others}", *side_file_warnings(donor)]
        return {}, [*warnings, *check_complete(str(donor.reference), {}, shapes)]
    if alignment.layers is not None:
        sliced = slice_config(config, alignment.layers, anatomy=donor.anatomy)
        config = sliced.config
        warnings += sliced.warnings
        check_layers_load(config, donor, alignment.layers)
    if alignment.tied != donor.tied:
        config = set_tied(config, alignment.tied)
    for module, layers in alignment.other_layers.items():
        config = slice_module_config(config, module, layers, anatomy=donor.anatomy)
    everything = bool(alignment.other_layers)
    unchanged = config == donor.checkpoint.config and shapes == donor.checkpoint.shapes
    known = donor.anatomy if unchanged else None
    warnings += check_complete(
        str(donor.reference), config, shapes, alignment.left_out, always=everything, anatomy=known
    )
    # the config states the dtype of most elements
    sizes: dict[str, int] = {}
    for draft in drafts:
        if not draft.copy:
            sizes[draft.dtype.name] = sizes.get(draft.dtype.name, 0) + draft.size
    if sizes:
        config = set_config_dtype(config, max(sizes, key=lambda name: sizes[name]))
    return config, [*warnings, *side_file_warnings(donor)]
