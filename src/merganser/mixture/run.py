"""Build a mixture of experts: plan the shared parts as an ordinary merge, put experts and routers in, and write it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anatomy import infer_anatomy, set_config_dtype
from ..checkpoint import DTYPE_BY_NAME, Checkpoint, DType, Reader, TensorInfo, derive, plan_shards
from ..checkpoint.tensor import ByteReader
from ..engine.alignment.complete import check_complete
from ..engine.new_tensors import copied_from
from ..engine.plan.part import place
from ..engine.plan.plan import Plan
from ..engine.plan.sections.census import InputCensus
from ..engine.plan.sections.mixture import MixtureSummary
from ..engine.plan.tensor import PlannedTensor
from ..engine.planner.drafts import promote
from ..engine.planner.planner import SHARD_BYTES, build_plan
from ..engine.run import Progress, Result, run_plan
from ..errors import CheckpointError, MergeError, UnsupportedError
from ..recipe import ModelReference
from .architectures import Layout, choose_layout
from .completed import completed
from .fitted import Advance, cheap_routers, prompt_routers, ridge_routers
from .joining import JoinRecipe, plan_joined
from .models import DenseTensors, Layer, check_expert, find_layers, open_expert
from .noise import noisy
from .recipe import Expert, MixtureRecipe, load_mixture
from .routers import Routers, random_rows
from .written import replaced

__all__ = ["mix", "plan_mixture"]


def plan_mixture(
    recipe: str | Path | Mapping[str, Any] | MixtureRecipe | JoinRecipe,
    *,
    advance: Advance | None = None,
    **options: Any,
) -> Plan:
    """Plan a mixture of experts; its routers are computed, and nothing is written.

    Args:
        recipe: The recipe of a mixture: its path, YAML text or a mapping, or one from `load_mixture`.
        advance: Called with the number of layers whose routers are done, and of all, where text passes through the model.
        **options: As for `merganser.engine.planner.planner.build_plan`.

    Raises:
        MergeError: The recipe or a model is not valid, or they do not fit; the message says why.
    """
    found = recipe if isinstance(recipe, MixtureRecipe | JoinRecipe) else load_mixture(recipe)
    if isinstance(found, JoinRecipe):
        return plan_joined(found, **options)
    if found.dense.random_seed is not None:
        options.setdefault("seed", found.dense.random_seed)
    try:
        dense = build_plan(found.dense, **options)
    except MergeError as error:
        raise type(error)(replaced(str(error), found.place_of("base_model"))) from None
    if dense.sidecars is not None:
        raise UnsupportedError(
            f"{found.place_of('shared')}: {dense.method.name} keeps sidecars, which a mixture cannot; choose another method"
        )
    base = dense.checkpoints[found.base]
    layout = choose_layout(found, base.config)
    layers = find_layers(base)[found.dense_layers :]
    members = _Members.open(found, dense, layers, options.get("cache_dir"))
    seed = options.get("seed", 0)
    # a shared expert without a gate has no part in what the routers are made from
    asked = found if layout.gated else replace(found, shared_expert=None)
    routers = _routers(asked, dense, members, layout, seed, advance)
    return _mixed(found, dense, members, layout, routers, seed, options.get("out_shard_size", SHARD_BYTES))


def mix(
    recipe: str | Path | Mapping[str, Any] | MixtureRecipe | JoinRecipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    advance: Advance | None = None,
    **options: Any,
) -> Result:
    """Build a mixture of experts from dense models of one shape, or join mixtures.

    Args:
        recipe: As for `plan_mixture`.
        out: Target folder; it appears when it is complete.
        overwrite: Replace a target that merganser wrote before, unless something in it was added or changed.
        fresh: Start again even if an interrupted run could be continued.
        progress: Receives reports of the writing.
        advance: As for `plan_mixture`.
        **options: As for `merganser.engine.planner.planner.build_plan`.

    Raises:
        MergeError: As for `plan_mixture`, or the target cannot be written.
        Interrupted: Ctrl-C was pressed; the same call continues the run.
    """
    from ..engine.output.staging import check_target

    check_target(Path(out), overwrite=overwrite)
    plan = plan_mixture(recipe, advance=advance, **options)
    return run_plan(plan, Path(out), overwrite=overwrite, fresh=fresh, progress=progress)


@dataclass(frozen=True)
class _Members:
    """The opened models of a mixture."""

    checkpoints: Mapping[ModelReference, Checkpoint]
    base: Checkpoint
    layers: list[Layer]

    @classmethod
    def open(cls, recipe: MixtureRecipe, dense: Plan, layers: list[Layer], cache_dir: Path | None) -> _Members:
        base = dense.checkpoints[recipe.base]
        opened = dict(dense.checkpoints)
        for expert in (*recipe.experts, *filter(None, [recipe.shared_expert])):
            if expert.model in opened:
                check_expert(expert, opened[expert.model], base, layers)
            else:
                opened[expert.model] = open_expert(expert, base, layers, cache_dir)
        return cls(opened, base, layers)

    def of(self, expert: Expert) -> Checkpoint:
        return self.checkpoints[expert.model]


def _routers(
    recipe: MixtureRecipe, dense: Plan, members: _Members, layout: Layout, seed: int, advance: Advance | None
) -> Routers:
    mode, layers, base = recipe.gate_mode, members.layers, members.base
    if mode in ("random", "uniform_random"):
        width = base.tensors[layers[0].projections["gate_proj"]].shape[1]
        uniform = mode == "uniform_random"
        rows = [
            random_rows(seed, layout.router(layer.name), len(recipe.experts), width, uniform=uniform)
            for layer in layers
        ]
        gates = [random_rows(seed, layout.shared_gate(layer.name), 1, width, uniform=uniform) for layer in layers]
        return Routers(rows, gates if recipe.shared_expert else [])
    if mode == "cheap_embed":
        shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
        embedding = infer_anatomy(shapes, base.config).embedding
        if embedding is None:
            raise CheckpointError(f"{base.reference}: has no embedding, which gate_mode cheap_embed reads")
        return cheap_routers(recipe, base, embedding, len(layers))
    if dense.whole_model:
        raise UnsupportedError(
            f"{recipe.place_of('shared')}: {dense.method.name} measures the whole model first, so the model cannot be run "
            f"while it is merged, as gate_mode {mode} needs; merge it by itself, and name the result as base_model"
        )
    with Reader() as reader:
        own = DenseTensors(dense, reader)
        if mode == "ridge":
            experts = [members.of(expert) for expert in recipe.experts]
            return ridge_routers(recipe, base, own, experts, layers, reader, advance)
        return prompt_routers(recipe, base, own, advance)


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of a router, which no file holds."""

    values: Tensor

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        return self.values[first:end]


def _mixed(
    recipe: MixtureRecipe,
    dense: Plan,
    members: _Members,
    layout: Layout,
    routers: Routers,
    seed: int,
    shard_size: int,
) -> Plan:
    """Return the plan of the mixture: the dense plan with experts and routers in place of its MLPs."""
    planned = {tensor.name: tensor for tensor in dense.tensors}
    of_layer = {name: index for index, layer in enumerate(members.layers) for name in layer.projections.values()}
    drafts: list[PlannedTensor] = []
    done: set[int] = set()
    for tensor in dense.tensors:
        index = of_layer.get(tensor.name)
        if index is None:
            drafts.append(tensor)
        elif index not in done:
            done.add(index)
            drafts += _layer(recipe, planned, members, layout, routers, index, seed)
    drafts = completed(drafts, layout, members.base, dense.config)
    shards = plan_shards([(draft.name, draft.dtype, draft.shape) for draft in drafts], shard_size, {})
    # copies, as most are tensors of the dense plan, too
    tensors = place([replace(draft) for draft in drafts], shards)
    config = _config(recipe, layout, dense.config, tensors)
    unsure = check_complete(str(recipe.base), config, {tensor.name: tensor.shape for tensor in tensors})
    summary = MixtureSummary(
        architecture=layout.model_class,
        experts=tuple(str(expert.model) for expert in recipe.experts),
        experts_per_token=recipe.experts_per_token,
        gate_mode=recipe.gate_mode,
        router=routers.report,
        digest=routers.digest(),
    )
    checkpoints = {reference: members.checkpoints[reference] for reference in members.checkpoints}
    return replace(
        dense,
        checkpoints=checkpoints,
        tensors=tensors,
        shards=shards,
        config=config,
        warnings=[*dense.warnings, *unsure, *_warnings(recipe, layout, dense.config, checkpoints)],
        census=_census(checkpoints, tensors),
        mixture=summary,
    )


def _config(
    recipe: MixtureRecipe, layout: Layout, config: Mapping[str, Any], tensors: Sequence[PlannedTensor]
) -> dict[str, Any]:
    """Return the config.json of the mixture, from that of the dense merge; it states the dtype of most elements."""
    found = layout.config(
        config,
        len(recipe.experts),
        recipe.experts_per_token,
        shared=recipe.shared_expert is not None,
        dense_layers=recipe.dense_layers,
    )
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype.name] += tensor.size
    return set_config_dtype(found, sizes.most_common(1)[0][0])


def _layer(
    recipe: MixtureRecipe,
    planned: Mapping[str, PlannedTensor],
    members: _Members,
    layout: Layout,
    routers: Routers,
    index: int,
    seed: int,
) -> list[PlannedTensor]:
    """Return router and experts of a layer."""
    layer = members.layers[index]
    like = planned[layer.projections["gate_proj"]]
    # a router's values come from no file; its own name distinguishes it from the tensors of the file that it is
    # recorded under
    beside = members.base.tensors[layer.projections["gate_proj"]]
    found = [_router(layout.router(layer.name), routers.rows[index], like, beside)]
    experts = [(expert, f"{number}") for number, expert in enumerate(recipe.experts)]
    for expert, number in experts:
        for kind, name in layer.projections.items():
            own = layout.expert(layer.name, int(number), kind)
            found.append(_projection(recipe, expert, planned[name], members, own, kind, seed))
    if recipe.shared_expert is not None:
        if layout.gated:
            found.append(_router(layout.shared_gate(layer.name), routers.gates[index], like, beside))
        for kind, name in layer.projections.items():
            own = layout.shared_expert(layer.name, kind)
            found.append(_projection(recipe, recipe.shared_expert, planned[name], members, own, kind, seed))
    return found


def _projection(
    recipe: MixtureRecipe, expert: Expert, like: PlannedTensor, members: _Members, name: str, kind: str, seed: int
) -> PlannedTensor:
    """Return the tensor of an expert: a copy, with noise and scaled if the recipe says so."""
    info = members.of(expert).tensors[like.name]
    declared = recipe.dense.out_dtype or recipe.dense.dtype
    dtype = (
        DTYPE_BY_NAME[declared]
        if declared
        else promote([_natural(own.tensors[like.name]) for own in _each(recipe, members)])
    )
    scale = expert.residual_scale if kind == "down_proj" else 1.0
    if expert.noise_scale:
        info = noisy(info, name, expert.noise_scale, seed)
    return copied_from(like, info, name=name, dtype=dtype, role="expert", scale=scale)


def _each(recipe: MixtureRecipe, members: _Members) -> list[Checkpoint]:
    asked = (*recipe.experts, *filter(None, [recipe.shared_expert]))
    return [members.base, *(members.of(expert) for expert in asked)]


def _natural(tensor: TensorInfo) -> DType:
    return tensor.natural or tensor.dtype


def _router(name: str, values: Tensor, like: PlannedTensor, beside: TensorInfo) -> PlannedTensor:
    shape = tuple(values.shape)
    info = derive(name, shape, [beside], _Values(values.to(torch.float32).contiguous()), natural=like.dtype)
    return copied_from(like, info, name=name, role="router")


def _warnings(
    recipe: MixtureRecipe, layout: Layout, dense: Mapping[str, Any], checkpoints: Mapping[ModelReference, Checkpoint]
) -> list[str]:
    found = []
    models = [expert.model for expert in recipe.experts]
    if len(models) > 1 and len(set(models)) == 1:
        found.append(
            f"all experts are {models[0]}, so the mixture computes what it does; it is useful only if it is trained"
        )
    if recipe.gate_mode in ("random", "uniform_random"):
        found.append(f"gate_mode {recipe.gate_mode}: the routers know nothing of the experts; train them")
    if recipe.gate_mode == "ridge" and layout.gated:
        found.append("the gate of the shared expert is not made from text: the expert counts half for every token")
    found += layout.notes(dense)
    for reference in dict.fromkeys(models):
        found += [note for note in checkpoints[reference].notes if note not in found]
    return found


def _census(
    checkpoints: Mapping[ModelReference, Checkpoint], tensors: Sequence[PlannedTensor]
) -> dict[ModelReference, InputCensus]:
    """Return for every tensor of every model whether the mixture holds it."""
    # several checkpoints may share files, so tensors are told apart as objects
    used: dict[int, bool] = {}
    for planned in tensors:
        copied = planned.copy or (len(planned.inputs) == 1 and planned.parameters.get("scale", (1.0,)) == (1.0,))
        # the tensor that an expert with noise is made from
        made_from = [part for source in planned.inputs for part in source.stored if planned.role == "expert"]
        for source in (*planned.inputs, *made_from):
            used[id(source)] = used.get(id(source), True) and copied
    found = {}
    for reference, checkpoint in checkpoints.items():
        held = [used[id(tensor)] for tensor in checkpoint.tensors.values() if id(tensor) in used]
        left = {name: _left(name) for name, tensor in checkpoint.tensors.items() if id(tensor) not in used}
        found[reference] = InputCensus(len(held) - sum(held), sum(held), {**checkpoint.left_out, **left})
    return found


def _left(name: str) -> str:
    if ".mlp." in name:
        return "the experts' MLPs replace it"
    return "the shared parts come from other inputs"
