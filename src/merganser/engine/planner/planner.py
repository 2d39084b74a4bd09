"""Plan a merge: read the inputs' headers, match their tensors, decide how and where each output tensor is merged."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...adapters.open import open_named
from ...anatomy import set_config_dtype, set_tied, slice_config
from ...anatomy.module_config import slice_module_config
from ...anatomy.settings.config import unquantised, with_older_rotary_keys
from ...anatomy.settings.mixtures import odd_routing
from ...checkpoint import Shard, plan_shards
from ...checkpoint.folder import WEIGHTS_KEY
from ...errors import CheckpointError
from ...method import MergeMethod
from ...recipe import ModelReference, Recipe, check_recipe
from ..agreement.configs import compare_configs
from ..agreement.ending import Ending, agree_on_ending
from ..agreement.quantisation import check_quantised, refuse_unreadable
from ..agreement.side_files import chat_template, file_origins, side_file_warnings, side_files, unread_warnings
from ..agreement.vocabularies import compare_tokens
from ..alignment.alignment import Alignment, Member
from ..alignment.complete import check_complete
from ..alignment.leftovers import without_leftovers
from ..alignment.loadable import check_layers_load
from ..alignment.modules import as_language_parts
from ..alignment.renaming import named_alike
from ..alignment.unstacking import unstacked
from ..fusion.machine import why_not
from ..kernels.blocks import BLOCK
from ..kernels.devices import resolve_devices
from ..permutation.apply import permute_members
from ..plan.float8 import quantise_output
from ..plan.from_data import check_weights
from ..plan.gguf import GgufSummary, gguf_output
from ..plan.memory import default_memory, fit_workers, kept_memory, memory_needs
from ..plan.part import place
from ..plan.plan import Plan
from ..plan.remote import check_stream
from ..plan.tensor import PlannedTensor
from ..sidecars.plan import plan_sidecars, sidecar_memory
from ..vocabulary.match import Matched, match_vocabularies
from .census import take_census
from .drafts import plan_tensors
from .noise import noise_warnings

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
    stream: bool = False,
    match: Match | None = None,
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
        stream: Read weights of models from the Hub by ranges while they are merged, and keep no copy of them.
        match: Gives the models of the recipe one vocabulary in another way than `match_vocabularies`.
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
    limit = max_memory or default_memory()
    inputs = _open_inputs(recipe, resolver.method, cache_dir, stream, match)
    members, permutation = permute_members(
        recipe, resolver.method, inputs.matched.members, folder=permutations, unmade=unmade, max_memory=limit
    )
    alignment, drafts, data = plan_tensors(recipe, resolver, members, permutation, measured)
    if recipe.check_statistics:
        check_weights(data, cache_dir, stream)
    output = _plan_output(recipe, members, inputs.matched, alignment, drafts, out_shard_size)
    tensors = place(output.drafts, output.shards)
    fused, fusion_warnings = _fuses(output.drafts, devices)
    wanted = threads or min(os.cpu_count() or 1, 8)
    keeps = all(found.type == "cpu" for found in devices)
    workers, kept, room = _share_memory(resolver.method, output.drafts, wanted, fused, limit, keeps=keeps)
    checkpoints = {reference: member.checkpoint for reference, member in members.items()}
    return Plan(
        recipe=recipe,
        method=resolver.method,
        checkpoints=checkpoints,
        donor=recipe.donor,
        tensors=tensors,
        shards=output.shards,
        config=output.ending.config,
        side_files=output.files,
        origins=output.origins,
        chat_template=output.template,
        generation_config=output.ending.generation_config,
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
            *inputs.warnings,
            *noise_warnings(checkpoints, tensors),
            *unread_warnings(members),
            *alignment.warnings,
            *output.warnings,
            *fusion_warnings,
        ],
        differences=resolver.differences(),
        vocabulary=inputs.matched.change,
        statistics=list({own.path: own for each in data for own in (*each.folders, *each.base_folders)}.values()),
        sidecars=plan_sidecars(resolver, tensors, out_shard_size, threads=wanted, max_memory=room),
        census=take_census(members, alignment, tensors, output.gguf),
        permutation=permutation,
        gguf=output.gguf,
    )


class _Inputs(NamedTuple):
    """The opened models of a recipe.

    Args:
        matched: The models, in one vocabulary.
        warnings: About how they were opened.
    """

    matched: Matched
    warnings: list[str]


def _open_inputs(
    recipe: Recipe, method: MergeMethod, cache_dir: Path | None, stream: bool, match: Match | None
) -> _Inputs:
    """Open the models of a recipe, and give them one vocabulary; arguments as for `build_plan`."""
    if stream:
        check_stream(recipe, method)
    members, warnings = _open_all(recipe, cache_dir, stream)
    check_quantised(recipe, {reference: member.checkpoint for reference, member in members.items()})
    if match is not None:
        return _Inputs(match(recipe, members, cache_dir), warnings)
    return _Inputs(match_vocabularies(recipe, members, cache_dir, stream=stream), warnings)


class _Output(NamedTuple):
    """How the output is stored, and what stands beside its weights.

    Args:
        drafts: Its tensors, in the dtypes in which they are written.
        shards: Its weight files.
        gguf: How it is written as GGUF; None if it is not.
        ending: Its configs.
        files: Files to copy, as `Plan.side_files`.
        origins: As in the plan.
        template: The chat template to write, if any.
        warnings: About all of these, and where the models' configs and vocabularies differ.
    """

    drafts: list[PlannedTensor]
    shards: list[Shard]
    gguf: GgufSummary | None
    ending: Ending
    files: dict[str, Path]
    origins: dict[str, list[str]]
    template: str | None
    warnings: list[str]


def _plan_output(
    recipe: Recipe,
    members: Mapping[ModelReference, Member],
    matched: Matched,
    alignment: Alignment,
    drafts: list[PlannedTensor],
    shard_bytes: int,
) -> _Output:
    """Decide how the merged tensors are stored, and what configs and other files the output gets."""
    donor, owner = members[recipe.donor], matched.owner
    warnings = compare_configs(donor, members.values(), alignment)
    warnings += matched.warnings if matched.change else compare_tokens(recipe, members, owner, alignment)
    config, config_warnings = _config(donor, alignment, drafts)
    drafts, config, quantise_warnings = quantise_output(recipe, drafts, config)
    template, template_of, template_warnings = chat_template(recipe, members, owner)
    drafts, shards, gguf = gguf_output(
        recipe,
        drafts,
        donor.checkpoint,
        moved_tokens=matched.change is not None,
        chat_template=template,
        block=BLOCK,
    )
    shards = shards or plan_shards([each for draft in drafts for each in draft.described], shard_bytes, {})
    config = with_older_rotary_keys(config)
    ending = agree_on_ending(donor, owner, config, template, matched.vocabulary, matched.moved)
    files = side_files(donor, owner, matched.change)
    origins = file_origins(donor, owner, files, _configs(ending), template_of, matched.change)
    warnings += [*config_warnings, *quantise_warnings, *template_warnings, *ending.warnings]
    return _Output(
        drafts=drafts,
        shards=shards,
        gguf=gguf,
        ending=ending,
        files=files,
        origins=origins,
        template=template,
        warnings=warnings,
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
    needs = memory_needs(drafts, fused)
    workers = fit_workers(drafts, wanted, fused, needs, limit, beside=beside)
    room = limit - needs.of(workers)
    kept = kept_memory(drafts, workers, room - beside) if keeps else 0
    return workers, kept, room - workers * kept


def _check_options(out_shard_size: int, threads: int | None, max_memory: int | None) -> None:
    for name, value in (("out_shard_size", out_shard_size), ("threads", threads), ("max_memory", max_memory)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _open_all(recipe: Recipe, cache_dir: Path | None, stream: bool) -> tuple[dict[ModelReference, Member], list[str]]:
    """Open every checkpoint; also return warnings about changed names and tensors left out."""
    members: dict[ModelReference, Member] = {}
    warnings: list[str] = []
    for reference in recipe.references():
        checkpoint = open_named(reference, recipe.place_of_model(reference), cache_dir, stream=stream)
        warnings += checkpoint.notes
        refuse_unreadable(recipe, reference, checkpoint)
        if checkpoint.wrappers:
            stripped = ", ".join(checkpoint.wrappers)
            warnings.append(
                f"{reference}: {stripped}: prefixes of a training framework, removed from the names of tensors"
            )
        checkpoint, left_out = without_leftovers(recipe, reference, checkpoint)
        warnings += left_out
        if recipe.quantize is not None:
            checkpoint, apart = unstacked(str(reference), checkpoint)
            warnings += apart
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
    if (problem := odd_routing(config)) is not None:
        raise CheckpointError(f"{donor.reference}: config.json: {problem}")
    if alignment.tied != donor.tied:
        config = set_tied(config, alignment.tied)
    for module, layers in alignment.other_layers.items():
        config = slice_module_config(config, module, layers, anatomy=donor.anatomy)
    everything = "layers of a module were chosen" if alignment.other_layers else None
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
