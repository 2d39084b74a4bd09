"""Plan a merge of adapters into one: which modules, with which parameters, of which rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...adapters import Adapter, LowRank, is_adapter, open_adapter, with_adapter
from ...adapters.open import open_named
from ...anatomy import Anatomy, infer_anatomy
from ...checkpoint import DTYPE_BY_NAME, TensorInfo
from ...errors import CheckpointError, MergeError, RecipeError, UnsupportedError
from ...method import Location, MergeMethod
from ...method.registry import get_factor_method, get_method_for_adapters
from ...recipe import ModelReference, Recipe, Resolver
from ...version import __version__
from ...wording import plural, some
from .kinds import Kind, kind_of

__all__ = ["AdapterPlan", "PlannedModule", "merges_adapters", "plan_adapters"]

_NO_EFFECT = (
    "tokenizer_source", "tokenizer", "chat_template", "unmatched", "quantised", "data", "keep_statistics",
    "align", "quantize", "gguf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """How one module is merged.

    Args:
        name: Name of the module.
        changes: Its change in each adapter; None where an adapter leaves it alone.
        parameters: Parameters of the method, by their names in recipes.
        location: Its location in the model.
        embedding: Whether it is an embedding.
    """

    name: str
    changes: tuple[LowRank | None, ...]
    parameters: Mapping[str, Any]
    location: Location
    embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the module."""
        first = next(change for change in self.changes if change is not None)
        return first.b.shape[0], first.a.shape[1]

    @property
    def ranks(self) -> list[int]:
        """Rank of the change in each adapter that changes it."""
        return [change.rank for change in self.changes if change is not None]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """A plan of merging adapters.

    Args:
        recipe: The recipe.
        method: The merge method.
        of_factors: Whether the method works on factors.
        space: "factors"; or for a method for weights "core" (small matrices that lose nothing), "full" matrices.
        kind: How a method for weights treats changes; None for one of factors.
        adapters: The adapters, in the order of the recipe.
        names: Their names in messages.
        modules: The modules.
        copied: Tensors that one adapter alone replaces, by their names in the file.
        base: Name of the base.
        dtype: Dtype of the output's factors.
        seed: Seed of random draws.
        warnings: Messages for the user.
        stages: Plans of the stages whose results it reads.
        made: Names of stages by the folders that stand for them while a plan is made.
        calibrations: Always empty: no method for adapters takes statistics from data.
    """

    recipe: Recipe
    method: MergeMethod
    of_factors: bool
    space: str
    kind: Kind | None
    adapters: Sequence[Adapter]
    names: Sequence[str]
    modules: Sequence[PlannedModule]
    copied: Mapping[str, TensorInfo]
    base: str | None
    dtype: str
    seed: int
    warnings: Sequence[str]
    stages: tuple[Any, ...] = ()
    made: Mapping[str, str] = field(default_factory=dict)
    calibrations: Sequence[Any] = ()

    def __repr__(self) -> str:
        adapters, modules = plural(len(self.adapters), "adapter"), plural(len(self.modules), "module")
        return f"<AdapterPlan: {self.method.name}, {adapters}, {modules}>"

    @property
    def transposed(self) -> bool:
        """Whether the base stores weights as [in, out]."""
        return self.adapters[0].config.transposed

    def shown(self, text: str) -> str:
        """Return a message with the names of stages in the place of their folders."""
        for folder, name in self.made.items():
            text = text.replace(folder, name)
        return text

    def fingerprint(self) -> str:
        """Hash everything that determines the result."""
        files = [file for adapter in self.adapters for file in (adapter.config.file, adapter.file)]
        facts = [
            __version__,
            self.recipe.text,
            self.seed,
            self.base,
            [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            [[module.name, repr(sorted(module.parameters.items()))] for module in self.modules],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def merges_adapters(recipe: Recipe) -> bool:
    """Return whether a recipe merges adapters into one: its models are adapters without a model.

    Raises:
        RecipeError: Some models are adapters and others are not; or a key is for adapters, and no model is one.
    """
    alone = [source for source in recipe.models if source.model.lora is None and is_adapter(source.model.path)]
    if not alone:
        for key in ("rank", "space"):
            if getattr(recipe, key) is not None:
                raise RecipeError(f"{recipe.place_of(key)}: is for merging adapters, and no model of the recipe is one")
        return False
    other = next((source for source in recipe.models if source not in alone), None)
    if other is not None:
        raise RecipeError(
            f"{alone[0].place}: {alone[0].model} is an adapter, and {other.model} is a model. Write MODEL+ADAPTER to merge "
            "models; name adapters alone to merge them into an adapter"
        )
    for key in _NO_EFFECT:
        if key in recipe.places:
            raise RecipeError(f"{recipe.place_of(key)}: has no effect on adapters; remove it")
    return True


def plan_adapters(recipe: Recipe, *, seed: int = 0, cache_dir: Path | None = None, stream: bool = False) -> AdapterPlan:
    """Plan a merge of adapters from their headers.

    Args:
        recipe: One for which `merges_adapters` is true.
        seed: Seed of random draws.
        cache_dir: Folder for a base from the Hub.
        stream: Whether the weights of such a base are left there.

    Raises:
        RecipeError: The recipe does not suit the method or the adapters.
        CheckpointError: An adapter is damaged, or the adapters do not fit each other or the base.
        UnsupportedError: An adapter is of a kind that cannot be merged with others.
    """
    method = _method(recipe)
    of_factors = get_factor_method(recipe.merge_method) is not None
    if of_factors and recipe.space is not None:
        raise RecipeError(f"{recipe.place_of('space')}: {method.name} works on the factors themselves")
    bare = (
        recipe if recipe.base_model or method.base == "unused" else replace(recipe, base_model=ModelReference("base"))
    )
    resolver = Resolver(bare, method)
    adapters = [_open(recipe, source.model) for source in resolver.sources(0).models]
    names = [str(source.model) for source in resolver.sources(0).models]
    _check_kinds(adapters, names)
    warnings = [*resolver.warnings, *_check_base(recipe, adapters, cache_dir, stream)]
    anatomy = _anatomy(adapters)
    modules = [_module(name, adapters, names, resolver, anatomy) for name in _module_names(adapters)]
    kind = None
    if not of_factors:
        kind = _kind(recipe, method, modules, len(adapters), seed)
    space = "factors" if of_factors else recipe.space or "core"
    return AdapterPlan(
        recipe=recipe,
        method=method,
        of_factors=of_factors,
        space=space,
        kind=kind,
        adapters=adapters,
        names=names,
        modules=modules,
        copied=_copied(adapters, names),
        base=_base(recipe, adapters),
        dtype=_dtype(recipe, adapters),
        seed=seed,
        warnings=[*warnings, *resolver.idle_filters(), *_notes(method, kind, space)],
    )


def _method(recipe: Recipe) -> MergeMethod:
    """Return the method of a recipe for adapters.

    Raises:
        RecipeError: There is none of this name.
        UnsupportedError: It cannot merge adapters.
    """
    place = recipe.place_of("merge_method")
    try:
        method = get_method_for_adapters(recipe.merge_method)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error
    if method.from_data or method.sidecar is not None:
        what = "statistics from data" if method.from_data else "a model from which others are restored"
        raise UnsupportedError(
            f"{place}: {method.name} needs {what}; merge models with adapters (MODEL+ADAPTER) instead"
        )
    return method


def _open(recipe: Recipe, reference: ModelReference) -> Adapter:
    try:
        return open_adapter(reference.path, revision=reference.revision)
    except MergeError as error:
        raise type(error)(f"{recipe.place_of_model(reference)}: {error}") from None


def _check_kinds(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """Refuse adapters whose changes are not sums of low rank, or are stored in different ways."""
    for adapter, name in zip(adapters, names, strict=True):
        config = adapter.config
        if config.kind != "LORA" or config.dora:
            raise UnsupportedError(
                f"{config.file}: is a {config.text} adapter, which is more than a low-rank change; merge models with it "
                f"instead (MODEL+{name})"
            )
        if config.parameters:
            raise UnsupportedError(f"{config.file}: target_parameters: packed experts cannot be merged as adapters yet")
        if config.keeps_ties:
            raise UnsupportedError(f"{config.file}: ensure_weight_tying: cannot be merged as an adapter yet")
        if not adapter.changes:
            raise CheckpointError(f"{adapter.file}: has no low-rank changes to merge")
        if config.transposed != adapters[0].config.transposed:
            raise CheckpointError(f"{config.file}: fan_in_fan_out differs from that of {names[0]}")


def _check_base(recipe: Recipe, adapters: Sequence[Adapter], cache_dir: Path | None, stream: bool) -> list[str]:
    """Check that adapters fit the recipe's base, if it names one; return notes about bases that differ."""
    if recipe.base_model is not None:
        base = recipe.base_model
        checkpoint = open_named(base, recipe.place_of("base_model"), cache_dir, stream=stream)
        notes = [note for adapter in adapters for note in with_adapter(checkpoint, adapter, str(base)).notes]
        return list(dict.fromkeys(notes))
    named = dict.fromkeys(adapter.config.base for adapter in adapters if adapter.config.base)
    if len(named) < 2:
        return []
    return [f"the adapters name different bases: {some([*named])}; the shapes of their tensors fit each other"]


def _base(recipe: Recipe, adapters: Sequence[Adapter]) -> str | None:
    """Return the name of the base for the output's config: the one that the adapters name, else the recipe's."""
    named = next((adapter.config.base for adapter in adapters if adapter.config.base), None)
    return named or (recipe.base_model.path if recipe.base_model else None)


def _module_names(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.changes))


def _anatomy(adapters: Sequence[Adapter]) -> Anatomy:
    shapes = {f"{name}.weight": change.shape for adapter in adapters for name, change in adapter.changes.items()}
    return infer_anatomy(shapes, {})


def _module(
    name: str, adapters: Sequence[Adapter], names: Sequence[str], resolver: Resolver, anatomy: Anatomy
) -> PlannedModule:
    changes = tuple(adapter.changes.get(name) for adapter in adapters)
    present = [(own, change) for own, change in zip(names, changes, strict=True) if change is not None]
    (first, expected), *others = present
    for own, change in others:
        if (change.shape, change.embedding) != (expected.shape, expected.embedding):
            raise CheckpointError(
                f"{name}: {list(expected.shape)} in {first}, {list(change.shape)} in {own}; only adapters of one base can "
                "be merged"
            )
    for own, change in present:
        if change.a.shape[0] != change.rank:
            raise CheckpointError(
                f"{own}: {name} has rank {change.rank} by the config, and A has {change.a.shape[0]} rows"
            )
    weight = f"{name}.weight"
    depth = anatomy.depth(weight)
    part = anatomy.parts[weight]
    t = depth if depth is not None else (1.0 if part.position == "after" else 0.0)
    location = Location(part.position, part.layer, anatomy.layer_count(weight), part.role)
    parameters = resolver.parameters(0, weight, [weight] * len(adapters), t)
    return PlannedModule(name, changes, parameters, location, expected.embedding)


def _kind(recipe: Recipe, method: MergeMethod, modules: Sequence[PlannedModule], count: int, seed: int) -> Kind:
    for name, statistic in method.statistics.items():
        if any(statistic.wanted(m.parameters) and statistic.where(m.parameters) == "model" for m in modules):
            raise UnsupportedError(
                f"{recipe.place_of('merge_method')}: {method.name}: {name} is measured over the whole model; merge models "
                "with adapters (MODEL+ADAPTER) instead"
            )
    kind = kind_of(method, modules[0].parameters, count, seed)
    if not kind.of_changes:
        raise UnsupportedError(
            f"{recipe.place_of('merge_method')}: {method.name} goes by the weights of the base, not by their changes alone; "
            "merge models with adapters (MODEL+ADAPTER) instead"
        )
    return kind


def _copied(adapters: Sequence[Adapter], names: Sequence[str]) -> dict[str, TensorInfo]:
    """Return tensors that replace the base's; several adapters with the same one cannot be merged, as in peft."""
    holders: dict[str, list[str]] = {}
    for adapter, name in zip(adapters, names, strict=True):
        for own in adapter.replaced:
            holders.setdefault(own, []).append(name)
    shared = next((own for own, held in holders.items() if len(held) > 1), None)
    if shared is not None:
        raise UnsupportedError(
            f"{shared}: {some(holders[shared])} each replace it whole (modules_to_save); such tensors are merged with "
            "models only (MODEL+ADAPTER)"
        )
    return {tensor.name: tensor for adapter in adapters for tensor in adapter.replaced.values()}


def _dtype(recipe: Recipe, adapters: Sequence[Adapter]) -> str:
    declared = recipe.out_dtype or recipe.dtype
    if declared:
        return DTYPE_BY_NAME[declared].name
    found = {part.dtype.name for each in adapters for change in each.changes.values() for part in (change.a, change.b)}
    return found.pop() if len(found) == 1 else ("float64" if "float64" in found else "float32")


def _notes(method: MergeMethod, kind: Kind | None, space: str) -> list[str]:
    if kind is None or space == "full" or kind.space is not None:
        return []
    return [
        f"{method.name} gives another result on the small matrices of the core space than on whole ones; "
        "'space: full' merges those, and cuts the result to the rank"
    ]
