"""Join mixtures of one shared part: experts of several contributors in one model, copied as they are; or drop experts again.

Source: W. Shi et al., "FlexOlmo: Open Language Models for Flexible Data Use", 2025 (arXiv 2507.07024). Each contributor trains
a mixture of two experts, of which the first and everything beside the experts stay as they were published; so the trained
experts of all fit beside each other, with the rows of their routers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..anatomy.experts import ExpertUnits, common_size, find_experts
from ..anatomy.settings.function import settings
from ..anatomy.settings.mixtures import COUNTS, chosen_experts, with_experts
from ..checkpoint import Checkpoint, Reader, TensorInfo, plan_shards
from ..checkpoint.derived.derived import read_elements
from ..checkpoint.derived.gathered import MadeRows, RowMap, gathered
from ..checkpoint.tensor import renamed
from ..engine.alignment.complete import check_complete
from ..engine.new_tensors import copied_from
from ..engine.plan.part import place
from ..engine.plan.plan import Plan
from ..engine.plan.sections.census import InputCensus
from ..engine.plan.sections.mixture import MixtureSummary
from ..engine.plan.tensor import PlannedTensor
from ..engine.planner.planner import SHARD_BYTES, build_plan
from ..errors import CheckpointError, MergeError, RecipeError, UnsupportedError
from ..recipe import ModelReference, Place, load_recipe
from ..recipe.document.place import Entry
from .written import replaced, written

__all__ = ["JOIN_KEYS", "Contributor", "JoinRecipe", "plan_joined", "read_join"]

JOIN_KEYS = ("join", "experts_per_token")
_KEYS = ("source_model", "experts")
_PIECE = 1 << 22
"""Elements that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Contributor:
    """A mixture whose experts are taken.

    Args:
        model: The mixture.
        experts: Numbers of its experts; None for all of the first contributor, and all but expert 0 of the others.
        place: Where the recipe names it.
    """

    model: ModelReference
    experts: tuple[int, ...] | None
    place: Place


@dataclass(frozen=True, slots=True)
class JoinRecipe:
    """How to join mixtures.

    Args:
        contributors: The mixtures; the first one gives everything beside the experts.
        experts_per_token: Number of experts that compute each token; None for what the first one has.
        place: Start of the document.
        text: The recipe as it was read.
    """

    contributors: tuple[Contributor, ...]
    experts_per_token: int | None
    place: Place
    text: str


def read_join(root: Entry, text: str) -> JoinRecipe:
    """Read the recipe of a join.

    Raises:
        RecipeError: It is not valid.
    """
    fields = root.mapping(JOIN_KEYS, required=["join"])
    found = tuple(_contributor(entry) for entry in fields["join"].items())
    names = [str(each.model) for each in found]
    for at, each in enumerate(found):
        if names[at] in names[:at]:
            raise RecipeError(f"{each.place}: {each.model} is joined twice; name each contributor once")
    if len(found) == 1 and found[0].experts is None:
        raise RecipeError(
            f"{fields['join'].place}: one mixture and all of its experts is a copy; name further ones, or some 'experts'"
        )
    per_token = fields["experts_per_token"].whole_number(1) if "experts_per_token" in fields else None
    return JoinRecipe(found, per_token, root.place, text)


def _contributor(entry: Entry) -> Contributor:
    fields = entry.mapping(_KEYS, required=["source_model"])
    experts = None
    if "experts" in fields:
        experts = tuple(item.whole_number() for item in fields["experts"].items())
        twice = next((each for each in experts if experts.count(each) > 1), None)
        if twice is not None:
            raise fields["experts"].error(f"names expert {twice} twice")
    return Contributor(ModelReference.parse(fields["source_model"]), experts, fields["source_model"].place)


@dataclass(frozen=True)
class _Opened:
    """A contributor that was opened; `taken` are the numbers of its experts in the output."""

    given: Contributor
    checkpoint: Checkpoint
    layers: list[ExpertUnits]
    taken: tuple[int, ...]


def plan_joined(recipe: JoinRecipe, **options: Any) -> Plan:
    """Plan a join; shared tensors are compared bit for bit, and nothing is written.

    Args:
        recipe: The recipe.
        **options: As for `merganser.engine.planner.planner.build_plan`.

    Raises:
        MergeError: A mixture is missing or damaged, the mixtures do not share everything else, or an expert is not there.
    """
    plans = [_copy(each, options) for each in recipe.contributors]
    opened: list[_Opened] = []
    for given, plan in zip(recipe.contributors, plans, strict=True):
        checkpoint = plan.checkpoints[plan.donor]
        opened.append(_open(given, checkpoint, opened[0] if opened else None))
    with Reader() as reader:
        compared = sum(_compare(reader, opened[0], other) for other in opened[1:])
        odd = _odd_rows(reader, opened)
    return _planned(recipe, plans[0], opened, odd, compared, options.get("out_shard_size", SHARD_BYTES))


def _copy(given: Contributor, options: Mapping[str, Any]) -> Plan:
    """Return the plan of a copy of a contributor."""
    try:
        return build_plan(
            load_recipe({"merge_method": "passthrough", "models": [{"model": written(given.model)}]}), **options
        )
    except MergeError as error:
        raise type(error)(replaced(str(error), given.place)) from None


def _open(given: Contributor, checkpoint: Checkpoint, first: _Opened | None) -> _Opened:
    where = f"{given.place}: {given.model}"
    try:
        layers = find_experts({name: t.shape for name, t in checkpoint.tensors.items()}, checkpoint.config)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(f"{where}: {error}") from None
    if any(own.parts > 1 for own in layers):
        raise UnsupportedError(
            f"{where}: its router chooses among groups of experts first (n_group), which cannot be joined"
        )
    size = common_size((own.size for own in layers), where)
    taken = given.experts if given.experts is not None else tuple(range(0 if first is None else 1, size))
    for expert in taken:
        if expert >= size:
            raise RecipeError(f"{where}: has no expert {expert}; its experts are 0 to {size - 1}")
    if not taken:
        raise RecipeError(f"{where}: has no expert beside the shared expert 0, so it contributes nothing")
    return _Opened(given, checkpoint, layers, taken)


def _compare(reader: Reader, first: _Opened, other: _Opened) -> int:
    """Refuse a contributor that differs from the first in anything that both should have; return the tensors compared."""
    where = f"{other.given.place}: {other.given.model}"
    mine, theirs = first.checkpoint, other.checkpoint
    # rotary settings have keys of two generations
    configs = [{**each.config, **settings(each.config)} for each in (mine, theirs)]
    for key in ("model_type", "hidden_size", "norm_topk_prob", "rope_theta", "rope_scaling", "rms_norm_eps"):
        ours, own = (each.get(key) for each in configs)
        if ours != own:
            raise CheckpointError(f"{where}: has {key} {own!r}, {first.given.model} {ours!r}")
    if [own.name for own in first.layers] != [own.name for own in other.layers]:
        raise CheckpointError(f"{where}: has experts in other layers than {first.given.model}")
    apart = [{name for own in each.layers for name in own.tensors} for each in (first, other)]
    names = sorted((mine.tensors.keys() - apart[0]) ^ (theirs.tensors.keys() - apart[1]))
    if names:
        raise CheckpointError(f"{where}: only one of it and {first.given.model} has {names[0]}")
    pairs: list[tuple[TensorInfo, TensorInfo, int | None]] = [
        (mine.tensors[name], theirs.tensors[name], None) for name in sorted(mine.tensors.keys() - apart[0])
    ]
    for ours, own in zip(first.layers, other.layers, strict=True):
        if (len(ours.single), ours.packed, ours.router) != (len(own.single), own.packed, own.router):
            raise CheckpointError(f"{where}: {own.name}: its tensors are other ones than those of {first.given.model}")
        # all contributors have the published expert at the first place
        shared = other.given.experts is None and 0 in first.taken
        for single in zip(ours.single, own.single, strict=True):
            if shared:
                pairs.append((mine.tensors[single[0][0]], theirs.tensors[single[1][0]], None))
            for number in other.taken:
                _same_shape(where, mine.tensors[single[0][0]], theirs.tensors[single[1][number]], 0)
        for name in (*own.packed, *own.router):
            _same_shape(where, mine.tensors[name], theirs.tensors[name], 1)
        if shared:
            pairs += [(mine.tensors[name], theirs.tensors[name], own.size) for name in own.packed]
    for one, two, experts in pairs:
        if not _equal(reader, one, two, experts):
            raise CheckpointError(
                f"{where}: {two.name}: {'expert 0 ' if experts else ''}differs from that of {first.given.model}; only "
                "mixtures whose shared part is the same, bit for bit, can be joined (merge them instead: merganser merge)"
            )
    return len(pairs)


def _same_shape(where: str, one: TensorInfo, two: TensorInfo, first: int) -> None:
    if one.shape[first:] != two.shape[first:] or one.dtype != two.dtype:
        raise CheckpointError(
            f"{where}: {two.name} is {two.dtype.name} {list(two.shape)}, of the first contributor {one.dtype.name} "
            f"{list(one.shape)}; experts that are joined must be alike"
        )


def _equal(reader: Reader, one: TensorInfo, two: TensorInfo, experts: int | None) -> bool:
    """Return whether two tensors have the same bytes; of packed experts, the first one of each."""
    if one.dtype != two.dtype or (experts is None and one.shape != two.shape):
        return False
    import torch

    count = two.numel // (experts or 1)
    for start in range(0, count, _PIECE):
        end = min(start + _PIECE, count)
        mine, theirs = (read_elements(reader, each, start, end).view(torch.uint8) for each in (one, two))
        if not torch.equal(mine, theirs):
            return False
    return True


def _odd_rows(reader: Reader, opened: Sequence[_Opened]) -> list[int]:
    """Return the contributors whose router's row of expert 0 is not that of the first, where that is shared."""
    found = []
    for at, other in enumerate(opened[1:], 1):
        if other.given.experts is not None or 0 not in opened[0].taken:
            continue
        names = [(name, own.size) for own in other.layers for name in own.router]
        tensors = [(opened[0].checkpoint.tensors[name], other.checkpoint.tensors[name], size) for name, size in names]
        if not all(_equal(reader, one, two, size) for one, two, size in tensors):
            found.append(at)
    return found


def _planned(
    recipe: JoinRecipe, plan: Plan, opened: Sequence[_Opened], odd: Sequence[int], compared: int, shard_size: int
) -> Plan:
    """Return the plan: that of a copy of the first contributor, with the experts of all."""
    of_layer = {name: at for at, own in enumerate(opened[0].layers) for name in own.tensors}
    drafts: list[PlannedTensor] = []
    done: set[int] = set()
    for tensor in plan.tensors:
        at = of_layer.get(tensor.name)
        if at is None:
            drafts.append(tensor)
        elif at not in done:
            done.add(at)
            drafts += _layer(tensor, opened, odd, at)
    shards = plan_shards([(draft.name, draft.dtype, draft.shape) for draft in drafts], shard_size, {})
    tensors = place(drafts, shards)
    experts = [(f"{each.given.model}", number) for each in opened for number in each.taken]
    config = _config(recipe, plan.config, len(experts))
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    changed = "the number of experts was changed"
    unsure = check_complete(str(recipe.contributors[0].model), config, shapes, always=changed)
    checkpoints = {each.given.model: each.checkpoint for each in opened}
    report = {"compared": compared, "odd_rows": [str(opened[at].given.model) for at in odd]}
    summary = MixtureSummary(
        architecture=(config.get("architectures") or [str(config.get("model_type"))])[0],
        experts=tuple(f"{model} (expert {number})" for model, number in experts),
        experts_per_token=chosen_experts(config) or 0,
        gate_mode="joined",
        router=report,
        digest=hashlib.sha256(repr((experts, odd)).encode()).hexdigest(),
    )
    warnings = [
        f"{opened[at].given.model}: its router's row of expert 0 is another one than the first contributor's; the mean of all "
        "contributors' rows is written, as FlexOlmo's program does"
        for at in odd
    ]
    return replace(
        plan,
        recipe=replace(plan.recipe, text=recipe.text),
        checkpoints=checkpoints,
        tensors=tensors,
        shards=shards,
        config=config,
        warnings=[*plan.warnings, *unsure, *warnings],
        census={each.given.model: _census(each, at == 0) for at, each in enumerate(opened)},
        mixture=summary,
    )


def _census(one: _Opened, first: bool) -> InputCensus:
    """Return what became of the tensors of a contributor."""
    experts = {names[number] for own in one.layers for names in own.single for number in one.taken}
    stacked = {name for own in one.layers for name in (*own.packed, *own.router)}
    singles = {name for own in one.layers for names in own.single for name in names}
    left = dict.fromkeys(sorted(singles - experts), "its expert is not taken")
    if not first:
        others = sorted(one.checkpoint.tensors.keys() - singles - stacked)
        left |= dict.fromkeys(others, "the first contributor's is the same")
    copied = len(one.checkpoint.tensors) - len(left)
    return InputCensus(0, copied, {**one.checkpoint.left_out, **left})


def _layer(like: PlannedTensor, opened: Sequence[_Opened], odd: Sequence[int], at: int) -> list[PlannedTensor]:
    """Return router and experts of a layer."""
    first = opened[0].layers[at]
    found = []
    for name in (*first.router, *first.packed):
        stacked = _stacked(name, opened, odd if name in first.router else ())
        found.append(_copied(like, name, stacked, "router" if name in first.router else "expert"))
    home = first.name.removesuffix(" experts")
    for leaf, names in enumerate(first.single):
        tail = names[0].removeprefix(f"{home}.experts.0.")
        sources = [each.checkpoint.tensors[each.layers[at].single[leaf][n]] for each in opened for n in each.taken]
        for number, source in enumerate(sources):
            name = f"{home}.experts.{number}.{tail}"
            found.append(_copied(like, name, renamed(source, name), "expert"))
    return found


def _stacked(name: str, opened: Sequence[_Opened], odd: Sequence[int]) -> TensorInfo:
    """Return a tensor with an expert along its first axis; where rows of expert 0 differ, their mean."""
    terms: list[list[tuple[int, int, float]]] = [
        [(at, number, 1.0)] for at, each in enumerate(opened) for number in each.taken
    ]
    if odd:
        shared = [0, *(at for at, each in enumerate(opened) if at and each.given.experts is None)]
        terms[opened[0].taken.index(0)] = [(at, 0, 1 / len(shared)) for at in shared]
    made = RowMap(np.array([-1 - row for row in range(len(terms))], np.int64), MadeRows.of(terms))
    return gathered([each.checkpoint.tensors[name] for each in opened], made)


def _copied(like: PlannedTensor, name: str, info: TensorInfo, role: str) -> PlannedTensor:
    return copied_from(like, info, name=name, dtype=info.natural or info.dtype, role=role)


def _config(recipe: JoinRecipe, config: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """Return config.json with the new numbers."""
    per_token = recipe.experts_per_token or min(chosen_experts(config) or 2, experts)
    if per_token > experts:
        raise RecipeError(f"{recipe.place}: experts_per_token: {per_token}, and there are {experts} experts")
    found = with_experts(config, experts, per_token)
    if found is None:
        raise CheckpointError(
            f"{recipe.contributors[0].place}: config.json does not say how many experts there are; give it one of {', '.join(COUNTS)}"
        )
    return found
