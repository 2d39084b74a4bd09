"""Interpret a recipe for its merge method: the inputs of each slice, and the parameters of each tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ParameterError, RecipeError
from .document.place import Place
from .document.scalar import read_scalar, shown
from .fields.reference import ModelReference
from .fields.setting import Rule, Setting, evaluate
from .keys import KEYS
from .model import Recipe, Slice, Source

if TYPE_CHECKING:
    from ..method import MergeMethod, Parameter

NO_EFFECT = {"int8_mask": "it changes how mergekit stores masks, not the result"}
_AFTER_LAYERS = ("model.norm.weight", "lm_head.weight")

Chain = tuple[Rule, ...]


def check_recipe(recipe: Recipe) -> Resolver:
    """Check a recipe against its merge method.

    Raises:
        RecipeError: There is no such method, or it does not accept these models.
        ParameterError: A parameter is unknown, missing, mistyped or out of range.
    """
    from ..method.registry import get_method

    try:
        method = get_method(recipe.merge_method)
    except RecipeError as error:
        raise RecipeError(f"{recipe.place_of('merge_method')}: {error}") from error
    return Resolver(recipe, method)


def check_layer_ranges(recipe: Recipe, n_layers: Mapping[ModelReference, int]) -> None:
    """Check that every range of layers exists in its model.

    Args:
        recipe: The recipe.
        n_layers: Number of layers of each model; models that are missing here are not checked.

    Raises:
        RecipeError: A range ends after the last layer of its model.
    """
    for piece in recipe.slices:
        for source in piece.sources:
            count = n_layers.get(source.model)
            if source.layer_range and count is not None and source.layer_range[1] > count:
                raise RecipeError(
                    f"{source.place}: layer_range {list(source.layer_range)} is too long: {source.model} has "
                    f"{count} layers, so the end may be {count} at most"
                )


def layer_depth(index: int, count: int) -> float:
    """Return the depth of a slice's layer for layer schedules: 0 for the first or only layer, 1 for the last."""
    return index / (count - 1) if count > 1 else 1.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a slice: its base, if the method uses one, and the other models, in order."""

    base: Source | None
    models: tuple[Source, ...]
    references: list[ModelReference] = field(init=False)
    """All of them, the base first."""

    def __post_init__(self) -> None:
        """List the references once, as they are compared with those of every tensor."""
        object.__setattr__(self, "references", [source.model for source in (self.base, *self.models) if source])


class Resolver:
    """A recipe, interpreted for its merge method.

    Args:
        recipe: The recipe.
        method: Its merge method.

    Attributes:
        slices: The slices; a recipe of `models` becomes one slice over everything.
        warnings: One line for each part of the recipe that has no effect.

    Raises:
        RecipeError: The method does not accept these models.
        ParameterError: A parameter is unknown, missing, mistyped or out of range, at any level.
    """

    def __init__(self, recipe: Recipe, method: MergeMethod) -> None:
        self.recipe = recipe
        self.method = method
        self.warnings = list(recipe.warnings)
        if recipe.modules and (why := _why_whole(method)):
            raise RecipeError(
                f"{recipe.place_of('modules')}: {method.name} {why}, so it takes whole models; write 'models'"
            )
        self.slices = self._slices()
        self._sources = [self._split(piece) for piece in self.slices]
        self._checked: dict[Place, tuple[Rule, ...]] = {}
        self._check_settings()
        self._chains = [
            self._slice_chains(piece, inputs) for piece, inputs in zip(self.slices, self._sources, strict=True)
        ]
        self._matched: set[Place] = set()
        self._interned: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        self._constant = [self._constant_parameters(i) for i in range(len(self.slices))]
        self.warnings = list(dict.fromkeys(self.warnings))

    def sources(self, slice_index: int) -> Inputs:
        """Return the base and the models of a slice, each with its range of layers.

        The base is included even if the recipe does not list it among the sources.
        """
        return self._sources[slice_index]

    def parameters(self, slice_index: int, output_name: str, input_names: Sequence[str], t: float) -> Mapping[str, Any]:
        """Return all parameters of the method for one tensor; equal parameters are returned as the same object.

        Args:
            slice_index: Slice of the tensor.
            output_name: Name of the tensor in the output, to which filters of shared parameters apply.
            input_names: Name of the tensor in each model but the base, to which filters of per-model parameters apply.
            t: Depth of the tensor's layer in the slice, 0 to 1.

        Returns:
            The value of each parameter; a tuple with one entry per model for per-model parameters.

        Raises:
            ParameterError: No filter of a required parameter matches, or the values contradict each other.
        """
        constant = self._constant[slice_index]
        if constant is not None:
            return constant
        values = tuple(
            tuple(self._value(p, chain, name, t) for chain, name in zip(chains, input_names, strict=True))
            if p.per_model
            else self._value(p, chains[0], output_name, t)
            for p, chains in self._chains[slice_index]
        )
        return self._intern(values, slice_index, output_name)

    def idle_filters(self) -> list[str]:
        """Return a warning for each filter that matched nothing so far; call it after `parameters` for all tensors."""
        rules = {rule.place: rule for each in self._chains for _, chains in each for chain in chains for rule in chain}
        return [
            f"{place}: no tensor takes this value: its name must contain {shown(rule.filter)}, and no earlier filter"
            for place, rule in rules.items()
            if rule.filter is not None and place not in self._matched
        ]

    def differences(self) -> list[str]:
        """Return where `compat: mergekit` would change numbers; call it after `parameters` for all tensors."""
        if self.recipe.compat == "mergekit":
            return []
        differences = []
        name = self.method.name
        sources = [source for piece in self.slices for source in piece.sources]
        levels = [*self._shared_levels(), *(source.parameters for source in sources)]
        for parameter, value in self.method.mergekit.items():
            declared = self.method.parameters[parameter]
            written = any(parameter in level for level in levels)
            if declared.default != value and not written and self._matters(parameter):
                differences.append(
                    f"{name}: {parameter} is {shown(declared.default)} by default; mergekit computes with "
                    f"{shown(value)}, and so does `compat: mergekit` (see `merganser methods {name}`)"
                )
        scheduled = [p.name for p, each in self._chains[-1] if any(_schedule_goes_on(chain) for chain in each)]
        if scheduled:
            differences.append(
                f"{', '.join(scheduled)}: tensors after the layers (final norm, head) take the last value of a layer "
                "schedule; mergekit gives them the first, and so does `compat: mergekit`"
            )
        if self._lone_base():
            differences.append(
                f"{name}: {self.recipe.base_model} is not among the models and only lends its config and tokenizer; "
                "mergekit merges it as a further model, and so does `compat: mergekit`"
            )
        return differences

    def _matters(self, parameter: str) -> bool:
        """Return whether a parameter can change any of the tensors that `parameters` was called for."""
        return any(self.method.matters(parameter, values) for values in self._interned.values())

    def _slices(self) -> tuple[Slice, ...]:
        """Return the slices of the recipe; `models` become one slice over everything."""
        recipe = self.recipe
        if recipe.modules:
            whole = {module.slices.start for module in recipe.modules if module.whole}
            return tuple(self._with_base(s) if i in whole else s for i, s in enumerate(recipe.slices))
        return recipe.slices or (self._with_base(Slice(recipe.models, {}, None, recipe.place_of("models"))),)

    def _with_base(self, piece: Slice) -> Slice:
        """Return a slice of whole models; as in mergekit, the base is a further model if it is not used otherwise."""
        base = self.recipe.base_model
        if self.recipe.compat != "mergekit" or base is None or not self._is_lone(piece.sources):
            return piece
        added = Source(base, None, {}, self.recipe.place_of("base_model"))
        return replace(piece, sources=(*piece.sources, added))

    def _lone_base(self) -> bool:
        """Return whether the base is neither listed nor used by the method; mergekit then treats it as a model."""
        modules = [self.recipe.slices[module.slices.start] for module in self.recipe.modules if module.whole]
        wholes = [self.recipe.models] if self.recipe.models else [piece.sources for piece in modules]
        return any(self._is_lone(sources) for sources in wholes)

    def _is_lone(self, sources: Sequence[Source]) -> bool:
        base = self.recipe.base_model
        return self.method.base == "unused" and base is not None and all(source.model != base for source in sources)

    def _split(self, piece: Slice) -> Inputs:
        """Separate the base of a slice from the models, and check the number of models."""
        method = self.method
        seen: dict[ModelReference, Place] = {}
        for source in piece.sources:
            if source.model in seen:
                raise RecipeError(f"{source.place}: {source.model} is listed twice, first at {seen[source.model]}")
            seen[source.model] = source.place
        base = None
        if method.base != "unused":
            reference = piece.base_model or self.recipe.base_model
            if reference is None and method.base == "required":
                raise RecipeError(
                    f"{self.recipe.place_of('merge_method')}: {method.name} needs a base; name it in 'base_model'"
                )
            base = self._base_source(piece, reference) if reference else None
        elif piece.base_model:
            self.warnings.append(f"{piece.place}: base_model has no effect on {method.name}")
        models = tuple(source for source in piece.sources if base is None or source.model != base.model)
        if len(models) < method.min_models or len(models) > (method.max_models or len(models)):
            found = f"{len(models)} model{'s' * (len(models) != 1)}" + (f" and the base {base.model}" if base else "")
            raise RecipeError(f"{piece.place}: {method.name} takes {method.models_text()}, got {found}")
        for source in piece.sources:
            if source.name is not None and (method.sidecar is None or source not in models):
                why = "the base is not a task" if method.sidecar else f"{method.name} keeps nothing for single models"
                self.warnings.append(f"{source.place}: name has no effect: {why}")
        if base is not None and base.parameters:
            self.warnings.append(
                f"{base.place}: parameters of the base have no effect; {method.name} takes it as it is"
            )
        return Inputs(base, models)

    def _base_source(self, piece: Slice, reference: ModelReference) -> Source:
        """Return the base as listed, or with the range of layers that all models share."""
        for source in piece.sources:
            if source.model == reference:
                return source
        ranges = {source.layer_range for source in piece.sources}
        if len(ranges) > 1:
            raise RecipeError(
                f"{piece.place}: list the base {reference} among the sources: the models have different layers, "
                "so its layer_range is not clear"
            )
        return Source(reference, ranges.pop(), {}, self.recipe.place_of("base_model"))

    def _check_settings(self) -> None:
        """Check every value of every parameter at every level."""
        self._check_level(self.recipe.parameters)
        for piece in self.slices:
            self._check_level(piece.parameters)
            for source in piece.sources:
                self._check_level(source.parameters, source)

    def _check_level(self, settings: Mapping[str, Setting], source: Source | None = None) -> None:
        for name, setting in settings.items():
            where = parent(setting.place)
            reason = NO_EFFECT.get(name) if name not in self.method.parameters else None
            reason = reason or self.method.ignored.get(name)
            if reason:
                self.warnings.append(f"{where}: {name} has no effect on {self.method.name}: {reason}")
                continue
            try:
                parameter = self._parameter(name, where)
            except ParameterError as error:
                if self.recipe.compat != "mergekit":
                    raise
                self.warnings.append(f"{error}; it is ignored, as by mergekit")
                continue
            self._checked[setting.place] = tuple(
                replace(rule, values=tuple(_check(parameter, value, rule, where) for value in rule.values))
                for rule in setting.rules
            )
            if source is not None and not parameter.per_model:
                problem = f"{name} is one value for all models of {self.method.name}"
                if parameter.required and not any(name in level for level in self._shared_levels()):
                    raise ParameterError(f"{where}: {problem}; write it in the recipe's 'parameters'")
                self.warnings.append(f"{where}: {name} has no effect here: {problem}")

    def _parameter(self, name: str, where: Place) -> Parameter:
        if name in KEYS and name not in self.method.parameters:
            raise ParameterError(
                f"{where}: {shown(name)} is not a parameter of {self.method.name} but a key of the recipe; "
                "write it at the top, not indented"
            )
        return self.method.parameter(name, str(where))

    def _shared_levels(self) -> Iterable[Mapping[str, Setting]]:
        return [self.recipe.parameters, *(piece.parameters for piece in self.slices)]

    def _slice_chains(self, piece: Slice, inputs: Inputs) -> list[tuple[Parameter, tuple[Chain, ...]]]:
        """Return the rules of each parameter, for each model or shared by all, most specific first."""
        levels = [piece.parameters, self.recipe.parameters]
        chains: list[tuple[Parameter, tuple[Chain, ...]]] = []
        for p in self.method.parameters.values():
            if p.per_model:
                chains.append((p, tuple(self._chain(p, [s.parameters, *levels], s) for s in inputs.models)))
            else:
                chains.append((p, (self._chain(p, levels, piece),)))
        return chains

    def _chain(self, p: Parameter, levels: Sequence[Mapping[str, Setting]], of: Source | Slice) -> Chain:
        rules: list[Rule] = []
        for level in levels:
            if p.name in level:
                for rule in self._checked[level[p.name].place]:
                    rules.append(rule)
                    if rule.filter is None:
                        return tuple(rules)
        if not p.required:
            default = self.method.mergekit.get(p.name, p.default) if self.recipe.compat else p.default
            rules.append(Rule(None, (default,), self.recipe.place))
        elif not rules:
            one = f" for each model, and {of.model} has none" if isinstance(of, Source) else ""
            here = " here or" if isinstance(of, Source) else ""
            raise ParameterError(
                f"{of.place}: {self.method.name} needs {p.name}{one}; write it{here} in the recipe's 'parameters': "
                f"{p.allowed}"
            )
        return tuple(rules)

    def _value(self, p: Parameter, chain: Chain, name: str, t: float) -> Any:
        for rule in chain:
            if rule.matches(name):
                if rule.filter is not None:
                    self._matched.add(rule.place)
                return evaluate(rule.values, t, pick=p.kind != "number")
        raise ParameterError(
            f"{chain[-1].place}: {p.name} has no value for {shown(name)}: no filter matches; "
            f"add an entry without a filter"
        )

    def _constant_parameters(self, slice_index: int) -> Mapping[str, Any] | None:
        """Return the parameters of a slice if they are the same for all its tensors, else None."""
        chains = self._chains[slice_index]
        if any(len(chain) > 1 or chain[0].filter or len(chain[0].values) > 1 for _, each in chains for chain in each):
            return None
        values = tuple(
            tuple(chain[0].values[0] for chain in each) if p.per_model else each[0][0].values[0] for p, each in chains
        )
        return self._intern(values, slice_index, "")

    def _intern(self, values: tuple[Any, ...], slice_index: int, name: str) -> Mapping[str, Any]:
        """Return the one mapping of these values: equal parameters are one object. Check new values together."""
        known = self._interned.get(values)
        if known is not None:
            return known
        mapping = dict(zip(self.method.parameters, values, strict=True))
        complaint = self.method.validate(mapping) if self.method.validate is not None else None
        if complaint:
            at = f" ({name})" if name else ""
            raise ParameterError(f"{self.slices[slice_index].place}{at}: {complaint}")
        self._interned[values] = mapping
        return mapping


def _why_whole(method: MergeMethod) -> str | None:
    """Return why a method cannot merge the modules of a model each in its own way; None if it can."""
    if method.sidecar is not None:
        return "stores what restores each model"
    if method.from_data or method.numbers:
        return "takes statistics from data, which are of whole models"
    return None


def _schedule_goes_on(chain: Chain) -> bool:
    """Return whether a layer schedule also applies to tensors after the layers, and ends on another value."""
    reached = [next((rule for rule in chain if rule.matches(name)), None) for name in _AFTER_LAYERS]
    return any(rule is not None and rule.values[0] != rule.values[-1] for rule in reached)


def _check(parameter: Parameter, value: object, rule: Rule, where: Place) -> Any:
    if isinstance(value, str) and parameter.kind != "choice":
        # mergekit accepts quoted numbers, so they are read as numbers here
        with contextlib.suppress(ValueError):
            value = read_scalar(value)
    return parameter.check(value, str(replace(where, line=rule.place.line)))


def parent(place: Place) -> Place:
    """Return the place of the mapping that an entry is in."""
    return replace(place, key=place.key.rpartition(".")[0])
