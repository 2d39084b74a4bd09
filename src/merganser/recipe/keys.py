"""The keys of recipes: which exist, where they belong, and how unknown ones are handled."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..catalogue import described
from ..errors import RecipeError, UnsupportedError, did_you_mean
from .document.place import Entry, Place, refuse_key
from .document.scalar import shown
from .fields.align import ALIGN_KEYS
from .fields.data import DATA_KEYS

KEYS = (
    "name",
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "compat",
    "unmatched",
    "quantised",
    "quantize",
    "gguf",
    "rank",
    "space",
    "random_seed",
    "data",
    "keep_statistics",
    "check_statistics",
    "align",
)
MODULE_KEYS = ("models", "slices", "parameters")
MODEL_KEYS = ("model", "adapter", "parameters", "name", "statistics", "data", "base_statistics")
SOURCE_KEYS = ("model", "adapter", "layer_range", "parameters", "statistics", "data")
SLICE_KEYS = ("sources", "parameters", "base_model", "residual_weight")
TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")

_PLACES = {
    "layer_range": "next to 'model' in the 'sources' of a slice",
    "sources": "in an entry of 'slices'",
    "residual_weight": "in an entry of 'slices'",
    "model": "in an entry of 'models', or of the 'sources' of a slice",
    "revision": "in the model: {path: ..., revision: ...}, or path@revision",
    "path": "in the model: {path: ..., revision: ...}",
    "lora": "in the model: {model: ..., lora: ...}",
    "adapter": "next to 'model', in an entry of 'models' or of the 'sources' of a slice; for the base, model+adapter",
    "override_architecture": "in the model: {model: ..., override_architecture: ...}",
    "filter": "in the value of a parameter: {filter: ..., value: ...}",
    "value": "in the value of a parameter: {filter: ..., value: ...}",
    "tokens": "in 'tokenizer', or in 'data'",
    "pad_to_multiple_of": "in 'tokenizer'",
    "statistics": "beside 'model' in 'models', or in the 'sources' of a slice",
    **dict.fromkeys(set(ALIGN_KEYS) - {"data"}, "in 'align'"),
    "metadata": "in 'gguf': {type: ..., metadata: ...}",
    **dict.fromkeys(set(DATA_KEYS) - {"tokens", "seed"}, "in 'data'"),
    **dict.fromkeys(set(KEYS) - {"name", "models", "parameters", "data"}, "at the top of the recipe, not indented"),
}

_FOREIGN = {
    **dict.fromkeys(
        (
            "experts",
            "gate_mode",
            "experts_per_token",
            "shared_experts",
            "source_model",
            "positive_prompts",
            "negative_prompts",
            "noise_scale",
            "residual_scale",
            "residual_gate",
        ),
        "a recipe of mergekit-moe, which builds a mixture of experts; merganser mix runs it",
    ),
    **dict.fromkeys(
        ("genome", "layer_granularity", "tasks", "smooth", "filters", "random_init", "num_fewshot"),
        "a recipe of mergekit-evolve, which searches for parameters: merganser search reads it",
    ),
    **dict.fromkeys(
        ("layer_slices", "embedding_source", "lm_head_source"),
        "a recipe of bakllama; write each entry of 'layer_slices' as a slice of a recipe of passthrough",
    ),
}


def refuse_foreign(root: Entry) -> None:
    """Refuse recipes of commands other than merging, which have no merge method.

    Raises:
        UnsupportedError: The mapping has no merge method, but a key of such a recipe.
    """
    pairs = root.value if isinstance(root.value, dict) else {}
    found = next((key for key in pairs if key in _FOREIGN), None)
    if found is not None and "merge_method" not in pairs:
        place = Place(root.place.file, pairs[found].line, found)
        raise UnsupportedError(f"{place}: this is {_FOREIGN[found]}")


@dataclass(slots=True)
class UnknownKeys:
    """Handle the keys of one recipe that have no meaning where they stand.

    Args:
        method: Name of the merge method; None where the recipe has none.
        ignore: Whether such keys are ignored with a warning; mergekit ignores them silently.
        warnings: Takes those warnings.
    """

    method: str | None
    ignore: bool
    warnings: list[str] = field(default_factory=list)

    def __call__(self, key: str, place: Place, allowed: Collection[str]) -> None:
        """Refuse a key, or warn that it is ignored; either message says where the key belongs.

        Raises:
            RecipeError: Keys are not ignored.
        """
        hint = self._hint(key, allowed)
        if self.ignore:
            self.warnings.append(f"{place}: {shown(key)} is ignored, as by mergekit.{hint}".removesuffix("."))
            return
        refuse_key(key, place, allowed, hint)

    def _hint(self, key: str, allowed: Collection[str]) -> str:
        """Return where a key belongs, or which key was probably meant."""
        if key in _PLACES:
            return f" Write it {_PLACES[key]}."
        if key in _FOREIGN:
            return f" It is a key of {_FOREIGN[key]}."
        if "parameters" in allowed and self._is_parameter(key):
            return f" It is a parameter of {self.method}: write it below 'parameters'."
        return did_you_mean(key, allowed)

    def _is_parameter(self, key: str) -> bool:
        if self.method is None:
            return False
        descriptions, _ = described()
        if self.method in descriptions:
            return key in {parameter.name for parameter in descriptions[self.method].parameters}
        # a method of another package, whose parameters only its code says
        from ..method.registry import get_method

        try:
            return key in get_method(self.method).parameters
        except RecipeError:
            return False
