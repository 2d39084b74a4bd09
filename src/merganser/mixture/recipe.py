"""Recipes of mixtures of experts: mergekit-moe's keys, and a few more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..recipe import ModelReference, Place, Recipe, load_recipe
from ..recipe.document.parsing import read_one
from ..recipe.document.place import Entry, Node
from ..recipe.fields.data import Data, make_data, read_data_fields
from ..recipe.load import DTYPE_ALIASES, DTYPES
from .joining import JoinRecipe, read_join
from .written import written

__all__ = ["GATE_MODES", "PROMPTED", "Expert", "MixtureRecipe", "load_mixture"]

KEYS = (
    "base_model",
    "experts",
    "shared_experts",
    "gate_mode",
    "experts_per_token",
    "architecture",
    "dense_layers",
    "dtype",
    "shared",
    "data",
    "ridge",
    "random_seed",
)
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "residual_scale", "noise_scale", "data")
SHARED_KEYS = ("merge_method", "parameters")
PROMPTED = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
"""Routers that are made from prompts."""

GATE_MODES = ("ridge", *PROMPTED, "random", "uniform_random")
_RIDGE = 0.01


@dataclass(frozen=True, slots=True)
class Expert:
    """A model whose MLPs become an expert of every layer.

    Args:
        model: The model.
        positive: Prompts that its router row should point to.
        negative: Prompts that it should point away from.
        residual_scale: Factor of its down projections.
        noise_scale: Standard deviation of normal noise that is added to its projections, before `residual_scale`.
        data: Text of its domain; None if none is given.
        place: Where the recipe names it.
    """

    model: ModelReference
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    residual_scale: float
    noise_scale: float
    data: Data | None
    place: Place


@dataclass(frozen=True, slots=True)
class MixtureRecipe:
    """How to build a mixture.

    Args:
        base: Gives config, tokenizer, and what `dense` does not merge.
        experts: The routed experts.
        shared_expert: The expert that computes every token; None without one.
        gate_mode: How routers are made, one of `GATE_MODES`.
        experts_per_token: Number of experts that compute each token.
        architecture: The output's architecture as the recipe names it; None for the one that fits the base.
        dense_layers: Number of first layers that stay dense: their MLPs are made as the other shared parts are.
        dense: How everything but the experts is made: a recipe of an ordinary merge.
        ridge: Regularisation of ridge routers, as a share of the mean square of their inputs.
        place: Start of the document.
        places: Where each top-level key stands.
    """

    base: ModelReference
    experts: tuple[Expert, ...]
    shared_expert: Expert | None
    gate_mode: str
    experts_per_token: int
    architecture: str | None
    dense_layers: int
    dense: Recipe
    ridge: float
    place: Place
    places: Mapping[str, Place] = field(repr=False)

    def place_of(self, key: str) -> Place:
        """Return where a top-level key stands; the start of the recipe if it is missing."""
        return self.places.get(key, self.place)


def load_mixture(source: str | Path | Mapping[str, Any]) -> MixtureRecipe | JoinRecipe:
    """Load the recipe of a mixture: of experts from dense models, or of mixtures that are joined.

    Args:
        source: A path, `-` for standard input, a YAML text with a line break, or a mapping.

    Raises:
        RecipeError: It is not a valid recipe of a mixture.
        NotFoundError: There is no such file.
    """
    document = read_one(source, "a mixture")
    root = Entry(document.root, Place(document.file, document.root.line, ""))
    if isinstance(root.value, dict) and "merge_method" in root.value and "experts" not in root.value:
        raise root.error("this recipe has a merge_method and no experts; merganser merge runs it")
    if isinstance(root.value, dict) and "join" in root.value:
        return read_join(root, document.text)
    fields = root.mapping(KEYS, required=["base_model", "experts"])
    common = fields.get("data")
    experts = tuple(_expert(entry, common) for entry in fields["experts"].items())
    shared = _shared_expert(fields)
    mode = _gate_mode(fields, experts)
    base = ModelReference.parse(fields["base_model"])
    dtype = fields["dtype"].choice(DTYPES, DTYPE_ALIASES) if "dtype" in fields else None
    dense = replace(_dense(base, experts, fields.get("shared"), dtype, fields), text=document.text)
    found = MixtureRecipe(
        base=base,
        experts=experts,
        shared_expert=shared,
        gate_mode=mode,
        experts_per_token=_per_token(fields, experts, mode),
        architecture=fields["architecture"].text() if "architecture" in fields else None,
        dense_layers=fields["dense_layers"].whole_number() if "dense_layers" in fields else 0,
        dense=dense,
        ridge=_number(fields["ridge"], above=0.0) if "ridge" in fields else _RIDGE,
        place=root.place,
        places={key: entry.place for key, entry in fields.items()},
    )
    _check_routers(found)
    return found


def _expert(entry: Entry, common: Entry | None) -> Expert:
    fields = entry.mapping(EXPERT_KEYS, required=["source_model"])
    data = None
    if "data" in fields:
        shared = None if common is None else read_data_fields(common)
        data = make_data(fields["data"], shared, read_data_fields(fields["data"]))
        if data.labels is not None:
            raise RecipeError(f"{data.place}: labels: routers are made without a loss; leave the key out")
    return Expert(
        model=ModelReference.parse(fields["source_model"]),
        positive=_prompts(fields.get("positive_prompts")),
        negative=_prompts(fields.get("negative_prompts")),
        residual_scale=_number(fields["residual_scale"]) if "residual_scale" in fields else 1.0,
        noise_scale=_noise(fields.get("noise_scale")),
        data=data,
        place=fields["source_model"].place,
    )


def _prompts(entry: Entry | None) -> tuple[str, ...]:
    if entry is None or entry.value == []:
        return ()
    # an empty prompt is the token that begins every text, if the tokenizer has one
    return tuple(item.text(longest=100_000, blank=True) for item in entry.items())


def _noise(entry: Entry | None) -> float:
    # mergekit-moe's recipes may say null
    if entry is None or entry.value is None:
        return 0.0
    found = _number(entry)
    if found < 0:
        raise entry.error(f"expected a number of at least 0, got {found:g}")
    return found


def _number(entry: Entry, above: float | None = None) -> float:
    value = entry.value
    if isinstance(value, bool) or not isinstance(value, int | float) or (above is not None and not value > above):
        raise entry.error(f"expected a number{'' if above is None else f' above {above:g}'}, got {value!r}")
    return float(value)


def _shared_expert(fields: Mapping[str, Entry]) -> Expert | None:
    if "shared_experts" not in fields or fields["shared_experts"].value == []:
        return None
    entries = fields["shared_experts"].items()
    if len(entries) > 1:
        raise fields["shared_experts"].error(f"one shared expert is possible, got {len(entries)}")
    return _expert(entries[0], None)


def _gate_mode(fields: Mapping[str, Entry], experts: tuple[Expert, ...]) -> str:
    if "gate_mode" in fields:
        return fields["gate_mode"].choice(GATE_MODES)
    return "ridge" if any(expert.data is not None for expert in experts) else "hidden"


def _per_token(fields: Mapping[str, Entry], experts: tuple[Expert, ...], mode: str) -> int:
    if "experts_per_token" not in fields:
        # ridge routers predict one domain; two experts are mergekit-moe's default, of every architecture
        return min(1 if mode == "ridge" else 2, len(experts))
    count = fields["experts_per_token"].whole_number(1)
    if count > len(experts):
        raise fields["experts_per_token"].error(f"{count} experts per token, and there are {len(experts)}")
    return count


def _check_routers(recipe: MixtureRecipe) -> None:
    """Refuse experts that lack what their router is made from."""
    mode = recipe.gate_mode
    if mode == "ridge":
        for expert in recipe.experts:
            if expert.data is None:
                raise RecipeError(
                    f"{expert.place}: gate_mode ridge needs text of each expert's domain: give 'data' here"
                )
    if mode in PROMPTED:
        for expert in recipe.experts:
            if not expert.positive:
                raise RecipeError(f"{expert.place}: gate_mode {mode} needs positive_prompts of each expert")
        if len(recipe.experts) > 1 and len({(e.positive, e.negative) for e in recipe.experts}) == 1:
            raise RecipeError(
                f"{recipe.place_of('experts')}: all experts have the same prompts, so the router cannot tell them apart; give each its own"
            )


def _dense(
    base: ModelReference,
    experts: tuple[Expert, ...],
    shared: Entry | None,
    dtype: str | None,
    fields: Mapping[str, Entry],
) -> Recipe:
    """Return the recipe of everything but the experts: the base copied, or all models merged."""
    found: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": written(base)}]}
    if shared is not None:
        own = shared.mapping(SHARED_KEYS, required=["merge_method"])
        models = dict.fromkeys(expert.model for expert in experts)
        found = {
            "merge_method": own["merge_method"].text(),
            "base_model": written(base),
            "models": [{"model": written(model)} for model in models],
        }
        if "parameters" in own:
            found["parameters"] = _plain(own["parameters"].node)
    if dtype is not None:
        found["dtype"] = dtype
    if "random_seed" in fields:
        found["random_seed"] = fields["random_seed"].whole_number()
    return load_recipe(found)


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(each) for key, each in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(each) for each in node.value]
    return node.value
