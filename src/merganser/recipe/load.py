"""Load recipes from a file, text or mapping: their structure only; `resolver` checks them against the merge method."""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from ..catalogue import canonical_name
from ..errors import NotFoundError, RecipeError, did_you_mean
from ..wording import some
from .document.parsing import Document, parse_mapping, parse_text
from .document.place import Entry, Node, Place
from .document.reading import MAX_BYTES, read_text, shown_path
from .document.scalar import CONTROL, shown
from .fields.align import read_align
from .fields.data import NO_SOURCE, names_source
from .fields.gguf import read_gguf_key
from .fields.templates import AUTO, CHAT_TEMPLATES
from .fields.tokens import read_token_rules
from .free import refuse_free_values
from .keys import KEYS, TOKENIZER_KEYS, UnknownKeys, refuse_foreign
from .model import Module, Recipe, Slice
from .modules import over, read_module_body, read_modules
from .parts import PartReader

DTYPES = ("float32", "float16", "bfloat16", "float64")
DTYPE_ALIASES = {
    **dict.fromkeys(("bf16", "brain", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "single", "torch.float32"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double", "torch.float64"), "float64"),
}
MAX_STAGE_NAME = 240
"""Bytes. File systems allow 255, and the folder has a longer name while the result is written."""

UNION = "union"
"""Value of `tokenizer_source` for the union of all models' tokenizers."""

MAX_MULTIPLE = 1 << 16
"""Largest `pad_to_multiple_of`."""

UNMATCHED = ("refuse", "base", "skip")
QUANTISED = ("refuse", "allow")
QUANTIZE = ("fp8_block", "fp8_channel")
SPACES = ("core", "full")

RecipeSource: TypeAlias = "str | Path | Mapping[str, Any]"


def load_recipe(source: RecipeSource) -> Recipe:
    """Load the one recipe of a file, a YAML text or a mapping.

    Args:
        source: A path, or `-` for standard input; a text with a line break is the YAML itself.

    Raises:
        RecipeError: The source is not a valid recipe, or holds several.
        NotFoundError: There is no such file.
        UnsupportedError: The recipe uses a feature that this version does not have.
    """
    documents = read_documents(source)
    if len(documents) > 1:
        raise RecipeError(
            f"{documents[0].file}: expected one recipe, got {len(documents)} documents; load_recipes reads them all"
        )
    return _recipe(documents[0], frozenset())


def load_recipes(source: RecipeSource) -> list[Recipe]:
    """Load all recipes of a source, each after the recipes whose results it uses by their `name`.

    Args:
        source: A path, or `-` for standard input; a text with a line break is the YAML itself.

    Raises:
        RecipeError: A recipe is not valid, names are not unique, or recipes need each other's results in a circle.
        NotFoundError: There is no such file.
        UnsupportedError: A recipe uses a feature that this version does not have.
    """
    documents = read_documents(source)
    names = frozenset(name for document in documents if isinstance(name := _value(document, "name"), str))
    recipes = [_recipe(document, names) for document in documents]
    return _stages(recipes) if len(recipes) > 1 else recipes


def read_documents(source: RecipeSource) -> list[Document]:
    """Read the documents of a file, a YAML text or a mapping, without looking at what they say.

    Args:
        source: As for `load_recipes`.

    Raises:
        RecipeError: The source is not YAML, or is empty.
        NotFoundError: There is no such file.
    """
    if isinstance(source, Mapping):
        return [parse_mapping(source, "<recipe>")]
    if isinstance(source, str) and "\n" in source:
        file, text = "<recipe>", source
    else:
        file = shown_path(Path(source))
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
        raise RecipeError(f"{file}: the recipe is empty; it needs at least merge_method and models")
    return documents


def _value(document: Document, key: str) -> object:
    """Return the unchecked value of a top-level key; None if the key is missing."""
    pairs = document.root.value
    return pairs[key].value if isinstance(pairs, dict) and key in pairs else None


def _stages(recipes: list[Recipe]) -> list[Recipe]:
    """Check the names of stages, and sort them: each after the stages that it uses, otherwise as written."""
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
        _check_stage_name(recipe, recipe.name)
        stages[recipe.name] = recipe
    return _sorted([*stages.values(), *unnamed])


def _check_stage_name(recipe: Recipe, name: str) -> None:
    """Refuse names that no folder can have, since the result of a stage is written to a folder of its name."""
    where = f"{recipe.place} name: {shown(name)}"
    if not all(part.strip(". ") for part in re.split(r"[/\\]", name)) or CONTROL.search(name):
        raise RecipeError(f"{where} must be usable as the name of a folder")
    length = len(name.encode()) + sum(2 * name.count(letter) for letter in "%/\\")
    if length > MAX_STAGE_NAME:
        raise RecipeError(
            f"{where} is too long for the name of a folder: {length} bytes, where '/', '\\' and '%' count as three; "
            f"{MAX_STAGE_NAME} are allowed"
        )


def _sorted(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Sort stages topologically, each after the stages that it uses, and otherwise keep the order as written."""
    numbers = {recipe.name: number for number, recipe in enumerate(recipes) if recipe.name is not None}
    needs = [{numbers[path] for m in recipe.references() for path in m.paths if path in numbers} for recipe in recipes]
    users: dict[int, list[int]] = {}
    for user, needed in enumerate(needs):
        for number in needed:
            users.setdefault(number, []).append(user)
    waits = [len(needed) for needed in needs]
    # in ascending order, so it is a valid heap already
    ready = [number for number, count in enumerate(waits) if count == 0]
    ordered: list[Recipe] = []
    while ready:
        number = heapq.heappop(ready)
        ordered.append(recipes[number])
        for user in users.get(number, ()):
            waits[user] -= 1
            if waits[user] == 0:
                heapq.heappush(ready, user)
    if len(ordered) < len(recipes):
        left = [recipe for recipe, count in zip(recipes, waits, strict=True) if count]
        names = some([shown(recipe.name) for recipe in left if recipe.name])
        raise RecipeError(f"{left[0].place}: these recipes need each other's results in a circle: {names}")
    return ordered


def _recipe(document: Document, stages: Collection[str]) -> Recipe:
    """Read one document; `stages` are the names of all stages in the file."""
    compat = _value(document, "compat")
    method = _value(document, "merge_method")
    unknown = UnknownKeys(canonical_name(method) if isinstance(method, str) else None, ignore=compat == "mergekit")
    root = Entry(document.root, Place(document.file, document.root.line, ""), unknown)
    if not isinstance(root.value, dict):
        raise root.error(f"a recipe is a mapping with lines such as 'merge_method: linear', got {shown(root.value)}")
    refuse_foreign(root)
    refuse_free_values(root)
    fields = root.mapping(KEYS, required=["merge_method"])
    if "tokenizer" in fields and "tokenizer_source" in fields:
        raise fields["tokenizer"].error("give 'tokenizer' or 'tokenizer_source', not both")
    body = _body(root, fields)
    reader = PartReader(unknown.warnings, stages, fields.get("data"))
    modules, slices = _modules_and_slices(body, fields, reader)
    recipe = Recipe(
        name=fields["name"].text() if "name" in fields else None,
        merge_method=canonical_name(fields["merge_method"].text()),
        models=tuple(reader.model(item) for item in body["models"].items()) if "models" in body else (),
        slices=slices,
        base_model=reader.reference(fields["base_model"]) if "base_model" in fields else None,
        parameters=over(reader.parameters(body), reader.parameters(fields)),
        dtype=_dtype(fields["dtype"]) if "dtype" in fields else None,
        out_dtype=_dtype(fields["out_dtype"]) if "out_dtype" in fields else None,
        tokenizer_donor=None,
        chat_template=_chat_template(fields["chat_template"]) if "chat_template" in fields else None,
        compat=cast(
            'Literal["mergekit"] | None', fields["compat"].choice(["mergekit"]) if "compat" in fields else None
        ),
        random_seed=fields["random_seed"].whole_number() if "random_seed" in fields else None,
        place=root.place,
        text=document.text,
        places={key: value.place for key, value in (body | fields).items()},
        unmatched=_unmatched(fields, bool(slices)),
        quantised=_quantised(fields),
        quantize=fields["quantize"].choice(QUANTIZE) if "quantize" in fields else None,
        gguf=read_gguf_key(fields["gguf"], fields) if "gguf" in fields else None,
        keep_statistics=fields["keep_statistics"].text() if "keep_statistics" in fields else None,
        rank=fields["rank"].whole_number(lowest=1) if "rank" in fields else None,
        space=cast('Literal["core", "full"] | None', fields["space"].choice(SPACES) if "space" in fields else None),
        check_statistics=fields["check_statistics"].flag() if "check_statistics" in fields else True,
        modules=modules,
    )
    if "align" in fields:
        align = read_align(fields["align"], recipe.references(), reader.reference, reader.common)
        recipe = replace(recipe, align=align)
    _check_data(recipe, fields, reader)
    return replace(_with_tokenizer(recipe, fields, reader), warnings=tuple(unknown.warnings))


def _check_data(recipe: Recipe, fields: Mapping[str, Entry], reader: PartReader) -> None:
    """Refuse settings of data where no text is named.

    Raises:
        RecipeError: There is none.
    """
    if reader.common is None or names_source(reader.common) or (recipe.align and recipe.align.data):
        return
    sources = [*recipe.models, *(source for piece in recipe.slices for source in piece.sources)]
    # where every model has statistics, the whole key is in vain, which is refused with the method
    if not any(source.data for source in sources) and not all(source.statistics for source in sources):
        raise fields["data"].error(NO_SOURCE)


def _modules_and_slices(
    body: dict[str, Entry], fields: dict[str, Entry], reader: PartReader
) -> tuple[tuple[Module, ...], tuple[Slice, ...]]:
    """Return the modules of a recipe, and its slices; a recipe of `models` has none of either."""
    if not body:
        return read_modules(fields["modules"], reader.model, reader.slice, reader.parameters)
    return (), tuple(reader.slice(item) for item in body["slices"].items()) if "slices" in body else ()


def _body(root: Entry, fields: dict[str, Entry]) -> dict[str, Entry]:
    """Return the entries that define the merge: the recipe's own, or those of its only module; none for several."""
    given = [key for key in ("models", "slices", "modules") if key in fields]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise root.error(f"a recipe has exactly one of models, slices and modules, got {found}")
    if given != ["modules"]:
        return {given[0]: fields[given[0]]}
    modules = fields["modules"].mapping()
    # mergekit's name for the only part of a language model
    return read_module_body(modules["default"]) if list(modules) == ["default"] else {}


def _dtype(entry: Entry) -> str:
    if isinstance(entry.value, str) and re.fullmatch(r"(torch\.)?(float8.*|fp8|f8.*)", entry.value):
        raise entry.error(
            f"float8 values need scales; give the dtype of the other tensors here, and 'quantize: {' or '.join(QUANTIZE)}'"
        )
    return entry.choice(DTYPES, DTYPE_ALIASES)


def _unmatched(fields: dict[str, Entry], has_slices: bool) -> Literal["refuse", "base", "skip"]:
    if "unmatched" not in fields:
        return "refuse"
    entry = fields["unmatched"]
    choice = cast('Literal["refuse", "base", "skip"]', entry.choice(UNMATCHED))
    if choice != "refuse" and has_slices:
        raise entry.error(f"{choice!r} is for recipes of models; slices and modules must hold the same tensors")
    if choice == "base" and "base_model" not in fields:
        raise entry.error("'base' takes parts from the base, and the recipe has no base_model")
    return choice


def _quantised(fields: dict[str, Entry]) -> Literal["refuse", "allow"]:
    if "quantised" not in fields:
        return "refuse"
    return cast('Literal["refuse", "allow"]', fields["quantised"].choice(QUANTISED))


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


def _with_tokenizer(recipe: Recipe, fields: dict[str, Entry], reader: PartReader) -> Recipe:
    """Return the recipe with what it says of the output's tokenizer."""
    if "tokenizer_source" in fields:
        source, parts = fields["tokenizer_source"], {}
    elif "tokenizer" in fields:
        parts = fields["tokenizer"].mapping(TOKENIZER_KEYS)
        # without a source, use the union, as mergekit does
        source = parts.get("source") or replace(fields["tokenizer"], node=Node(UNION, 0))
    else:
        return recipe
    named = source.value not in (UNION, "base")
    rules = read_token_rules(parts["tokens"], recipe.references(), reader.reference) if "tokens" in parts else ()
    multiple = parts["pad_to_multiple_of"].whole_number(lowest=1) if "pad_to_multiple_of" in parts else 1
    if multiple > MAX_MULTIPLE:
        raise parts["pad_to_multiple_of"].error(f"at most {MAX_MULTIPLE:,} is allowed, got {multiple:,}")
    return replace(
        recipe,
        tokenizer_donor=reader.reference(source) if named else recipe.donor,
        tokenizer_union=source.place if source.value == UNION else None,
        token_rules=rules,
        row_multiple=multiple,
    )
