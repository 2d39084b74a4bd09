"""From a file, text or mapping to recipes: the structure; what the merge method makes of it comes later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from ..errors import NotFoundError, RecipeError, UnsupportedError, did_you_mean
from .document import MAX_BYTES, Document, parse_mapping, parse_text, read_text
from .model import Recipe, Slice, Source
from .place import Entry, Node, Place, shown
from .reference import ModelReference
from .setting import Setting
from .templates import AUTO, CHAT_TEMPLATES

DTYPES = ("float32", "float16", "bfloat16", "float64")
DTYPE_ALIASES = {
    **dict.fromkeys(("bf16", "brain", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "single", "torch.float32"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double", "torch.float64"), "float64"),
}
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
    "random_seed",
)
MODEL_KEYS = ("model", "parameters", "name")
SOURCE_KEYS = ("model", "layer_range", "parameters")
SLICE_KEYS = ("sources", "parameters", "base_model", "residual_weight")
TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")

RecipeSource: TypeAlias = "str | Path | Mapping[str, Any]"


def load_recipe(source: RecipeSource) -> Recipe:
    """Load the one recipe of a file, a YAML text or a mapping.

    Args:
        source: A path; a text with a line break is the YAML itself.

    Raises:
        RecipeError: It is not a valid recipe, or there are several.
        NotFoundError: There is no such file.
        UnsupportedError: It asks for what a later version brings.
    """
    documents = _documents(source)
    if len(documents) > 1:
        raise RecipeError(
            f"{documents[0].file}: expected one recipe, got {len(documents)} documents; load_recipes reads them all"
        )
    return _recipe(documents[0])


def load_recipes(source: RecipeSource) -> list[Recipe]:
    """Load all recipes of a source, in an order in which each may use those before it by their `name`.

    Args:
        source: A path; a text with a line break is the YAML itself.

    Raises:
        RecipeError: A recipe is not valid, or the names are not unique, or stages need each other in a circle.
        NotFoundError: There is no such file.
        UnsupportedError: It asks for what a later version brings.
    """
    recipes = [_recipe(document) for document in _documents(source)]
    return _stages(recipes) if len(recipes) > 1 else recipes


def _documents(source: RecipeSource) -> list[Document]:
    if isinstance(source, Mapping):
        return [parse_mapping(source, "<recipe>")]
    if isinstance(source, str) and "\n" in source:
        file, text = "<recipe>", source
    else:
        file = str(source)
        try:
            text = read_text(Path(source))
        except NotFoundError:
            if ": " in file:
                raise NotFoundError(
                    f"{shown(file)}: there is no such recipe file; a YAML text needs a line break to be taken for one"
                ) from None
            raise
    documents = parse_text(text, file)
    if not documents:
        raise RecipeError(f"{file}: the recipe is empty")
    return documents


def _stages(recipes: list[Recipe]) -> list[Recipe]:
    """Check the names of stages, and sort: a stage after those that it uses, otherwise as written."""
    unnamed = [recipe for recipe in recipes if recipe.name is None]
    if len(unnamed) > 1:
        raise RecipeError(f"{unnamed[1].place}: only one recipe of several may go without 'name'; name this one")
    stages: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is None:
            continue
        if recipe.name in stages:
            first = stages[recipe.name].place
            raise RecipeError(f"{recipe.place}: the name {shown(recipe.name)} is taken by the recipe at {first}")
        parts = re.split(r"[/\\]", recipe.name)
        if not all(part.strip(". ") for part in parts):
            raise RecipeError(f"{recipe.place} name: {shown(recipe.name)} must be usable as the name of a folder")
        stages[recipe.name] = recipe
    ordered: list[Recipe] = []
    left = [recipe for recipe in recipes if recipe.name is not None] + unnamed
    while left:
        waiting = {recipe.name for recipe in left}
        ready = next((r for r in left if not any(model.path in waiting for model in r.references())), None)
        if ready is None:
            names = ", ".join(shown(recipe.name) for recipe in left if recipe.name)
            raise RecipeError(f"{left[0].place}: these recipes need each other's results in a circle: {names}")
        ordered.append(ready)
        left.remove(ready)
    return ordered


def _recipe(document: Document) -> Recipe:
    root = Entry(document.root, Place(document.file, document.root.line, ""))
    if not isinstance(root.value, dict):
        raise root.error(f"a recipe is a mapping with lines such as 'merge_method: linear', got {shown(root.value)}")
    fields = root.mapping(KEYS, required=["merge_method"])
    _one_of_models_slices_modules(root, fields)
    warnings: list[str] = []
    reader = _Reader(warnings)
    compat = fields["compat"].choice(["mergekit"]) if "compat" in fields else None
    recipe = Recipe(
        name=fields["name"].text() if "name" in fields else None,
        merge_method=fields["merge_method"].text(),
        models=tuple(reader.model(item) for item in fields["models"].items()) if "models" in fields else (),
        slices=tuple(reader.slice(item) for item in fields["slices"].items()) if "slices" in fields else (),
        base_model=reader.reference(fields["base_model"]) if "base_model" in fields else None,
        parameters=reader.parameters(fields),
        dtype=_dtype(fields["dtype"]) if "dtype" in fields else None,
        out_dtype=_dtype(fields["out_dtype"]) if "out_dtype" in fields else None,
        tokenizer_donor=None,
        chat_template=_chat_template(fields["chat_template"]) if "chat_template" in fields else None,
        compat=cast('Literal["mergekit"] | None', compat),
        random_seed=_seed(fields["random_seed"]) if "random_seed" in fields else None,
        place=root.place,
        text=document.text,
        places={key: value.place for key, value in fields.items()},
        warnings=tuple(warnings),
    )
    if "tokenizer" in fields and "tokenizer_source" in fields:
        raise fields["tokenizer"].error("give 'tokenizer' or 'tokenizer_source', not both")
    source = _tokenizer_source(fields)
    return replace(recipe, tokenizer_donor=_tokenizer_donor(source, recipe)) if source else recipe


def _one_of_models_slices_modules(root: Entry, fields: dict[str, Entry]) -> None:
    given = [key for key in ("models", "slices", "modules") if key in fields]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise root.error(f"a recipe has exactly one of models, slices and modules, got {found}")
    if given == ["modules"]:
        raise UnsupportedError(
            f"{fields['modules'].place}: recipes for models of several parts come in a later version; "
            "write 'models' or 'slices'"
        )


class _Reader:
    """Read the parts of a recipe, collecting warnings."""

    def __init__(self, warnings: list[str]) -> None:
        self.warnings = warnings

    def model(self, entry: Entry) -> Source:
        fields = entry.mapping(MODEL_KEYS, required=["model"])
        name = fields["name"].text(longest=100) if "name" in fields else None
        return Source(self.reference(fields["model"]), None, self.parameters(fields), entry.place, name)

    def slice(self, entry: Entry) -> Slice:
        fields = entry.mapping(SLICE_KEYS, required=["sources"])
        sources = tuple(self.source(item) for item in fields["sources"].items())
        lengths = {source.layer_range[1] - source.layer_range[0] for source in sources if source.layer_range}
        if len(lengths) > 1:
            ranges = ", ".join(str(list(source.layer_range)) for source in sources if source.layer_range)
            raise fields["sources"].error(f"all sources of a slice must have as many layers, got {ranges}")
        if "residual_weight" in fields:
            self.warnings.append(f"{fields['residual_weight'].place}: residual_weight has no effect, as in mergekit")
        base = self.reference(fields["base_model"]) if "base_model" in fields else None
        return Slice(sources, self.parameters(fields), base, entry.place)

    def source(self, entry: Entry) -> Source:
        fields = entry.mapping(SOURCE_KEYS, required=["model", "layer_range"])
        return Source(
            self.reference(fields["model"]), _layer_range(fields["layer_range"]), self.parameters(fields), entry.place
        )

    def reference(self, entry: Entry) -> ModelReference:
        reference = ModelReference.parse_supported(entry)
        if reference.override_architecture:
            self.warnings.append(f"{entry.place}: override_architecture has no effect: tensors are matched by name")
        return replace(reference, override_architecture=None)

    def parameters(self, fields: dict[str, Entry]) -> dict[str, Setting]:
        if "parameters" not in fields:
            return {}
        entry = fields["parameters"]
        settings = {name: Setting.parse(value) for name, value in entry.mapping().items()}
        for name, node in cast("dict[str, Node]", entry.value).items():
            if name not in settings:
                raise Entry(node, replace(entry.place, line=node.line)).error(f"{shown(name)} has no value")
        return settings


def _layer_range(entry: Entry) -> tuple[int, int]:
    nodes: list[Node] = entry.value if isinstance(entry.value, list) else []
    ends = [node.value for node in nodes]
    if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise entry.error("expected [first layer, layer after the last], two whole numbers")
    first, end = cast("list[int]", ends)
    if first < 0 or end < 0:
        raise entry.error(f"layers count from 0, got [{first}, {end}]")
    if first == end:
        raise entry.error(f"[{first}, {end}] holds no layer: the end is not included")
    if first > end:
        raise entry.error(f"[{first}, {end}] runs backwards. Did you mean [{end}, {first}]?")
    return first, end


def _dtype(entry: Entry) -> str:
    return entry.choice(DTYPES, DTYPE_ALIASES)


def _seed(entry: Entry) -> int:
    if not isinstance(entry.value, int) or isinstance(entry.value, bool) or entry.value < 0:
        raise entry.error(f"expected a whole number of at least 0, got {shown(entry.value)}")
    return entry.value


def _chat_template(entry: Entry) -> str:
    text = entry.text(longest=MAX_BYTES)
    if text == AUTO:
        return AUTO
    if text in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[text]
    if len(text) < 20 or "{" not in text:
        known = (AUTO, *CHAT_TEMPLATES)
        hint = did_you_mean(text, known)
        raise entry.error(f"expected one of {', '.join(known)} or a Jinja template, got {shown(text)}.{hint}")
    return text


def _tokenizer_source(fields: dict[str, Entry]) -> Entry | None:
    """Return the entry that names the tokenizer's donor, refusing what changes tokenizers."""
    if "tokenizer_source" in fields:
        return fields["tokenizer_source"]
    if "tokenizer" not in fields:
        return None
    parts = fields["tokenizer"].mapping(TOKENIZER_KEYS)
    for key in ("tokens", "pad_to_multiple_of"):
        if key in parts and parts[key].value != {}:
            raise UnsupportedError(f"{parts[key].place}: changing the vocabulary comes in a later version")
    if "source" not in parts:
        # mergekit's default
        raise UnsupportedError(f"{fields['tokenizer'].place}: the union of tokenizers comes in a later version")
    return parts["source"]


def _tokenizer_donor(entry: Entry, recipe: Recipe) -> ModelReference:
    if entry.value == "union":
        raise UnsupportedError(
            f"{entry.place}: the union of tokenizers comes in a later version; name the model whose tokenizer to keep"
        )
    if entry.value == "base":
        return recipe.donor
    reference = replace(ModelReference.parse_supported(entry), override_architecture=None)
    if reference not in recipe.references():
        known = ", ".join(str(model) for model in recipe.references())
        raise UnsupportedError(
            f"{entry.place}: a tokenizer from outside the recipe comes in a later version, "
            f"got {shown(str(reference))}; the recipe has {known}"
        )
    return reference
