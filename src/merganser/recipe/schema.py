"""The JSON schema of recipes, for editors; generated from the registry.

Definitions that many methods share (types of values, settings with schedules and filters, models and slices) are
written once, under `$defs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..statistics.choice import COUNTED, DEFAULT_LENGTH, DEFAULT_SEQUENCES, LABELS
from .document.scalar import FLAGS, FLOAT, MAX_DIGITS
from .fields.align import ALIGN_BY, ALIGN_UNITS
from .fields.data import DATA_KEYS
from .fields.gguf import GGUF_TYPES
from .fields.templates import AUTO, CHAT_TEMPLATES
from .load import DTYPES, QUANTISED, QUANTIZE, UNMATCHED

if TYPE_CHECKING:
    from ..method import MergeMethod, Parameter

Schema = dict[str, Any]

SCHEMA_ID = "urn:merganser:recipe"
"""What the schema is called, in every version and wherever its file is."""

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")
"""The schema of our own methods, as it is installed."""

_NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string", "pattern": r"\S"}


def json_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of one recipe.

    The schema accepts every recipe that loads and suits its merge method, except for keys that `compat: mergekit`
    ignores, which editors should mark. It also accepts some recipes that do not load: it cannot check models, nor the
    range of a number in quotes.
    """
    from ..method.registry import every_method

    known = every_method()
    parameters = [p for method in known.values() for p in method.parameters.values()]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "Merganser recipe",
        "type": "object",
        "required": ["merge_method"],
        "oneOf": [_has(key) for key in ("models", "slices", "modules")],
        "additionalProperties": False,
        "properties": _properties(known.values()),
        "allOf": [_rules_of(method) for method in known.values()],
        "$defs": {
            **_shared(),
            **_values(parameters),
            **{f"levels.of.{name}": _levels(method) for name, method in known.items()},
            **{name: _parameters(method) for name, method in known.items()},
        },
    }


def _properties(known: Iterable[MergeMethod]) -> Schema:
    dtype: Schema = {"enum": [*DTYPES, None]}
    names = [AUTO, *CHAT_TEMPLATES]
    template: Schema = {"anyOf": [{"enum": names}, {"type": "string", "minLength": 20, "pattern": "[{]"}, _NULL]}
    return {
        "name": _described(_or_null(_TEXT), "Name of a stage, which later recipes of the file may use as a model."),
        "merge_method": {"oneOf": [{"const": method.name, "description": method.doc.summary} for method in known]},
        "models": _or_null(_ref("models")),
        "slices": _or_null(_ref("slices")),
        "modules": _described(
            _or_null({"type": "object", "minProperties": 1, "additionalProperties": _ref("module")}),
            "What is merged into each part of a larger model: text_decoder, vision_tower, encoder, ...",
        ),
        "base_model": _described(_or_null(_ref("reference")), "The common ancestor; also lends config and tokenizer."),
        "parameters": _ref("parameters"),
        "dtype": _described(dtype, "Type that inputs are cast to when they are read."),
        "out_dtype": _described(dtype, "Type of the output."),
        "tokenizer_source": _described(
            _or_null(_ref("reference")),
            "'base', 'union', or a model whose tokenizer the output gets; rows are then matched by token.",
        ),
        "tokenizer": _or_null(
            _object(
                {
                    "source": _or_null(_ref("reference")),
                    "tokens": _or_null(_ref("tokens")),
                    "pad_to_multiple_of": _or_null(_ref("count")),
                },
                required=[],
            )
        ),
        "chat_template": _described(template, f"{', '.join(names)}, or a Jinja template."),
        "compat": _described({"enum": ["mergekit", None]}, "Reproduce mergekit where it differs from the papers."),
        "unmatched": _described(
            {"enum": [*UNMATCHED, None]}, "Tensors after the layers that some models lack or have in another shape."
        ),
        "quantised": _described({"enum": [*QUANTISED, None]}, "Models quantised in another way than the base."),
        "quantize": _described(
            {"enum": [*QUANTIZE, None]}, "Store the weights of linear layers as float8 with scales."
        ),
        "gguf": _described(_gguf(), "Write the output as GGUF, with this type."),
        "rank": _described(_or_null(_ref("count")), "Rank of an adapter that is merged from adapters."),
        "space": _described({"enum": ["core", "full", None]}, "Where adapters are merged by methods for weights."),
        "align": _described(_or_null(_align()), "Permute models to a reference before they are merged."),
        "random_seed": _or_null(_ref("count")),
        "data": _described(
            _or_null(_ref("data")), "Data that models are calibrated on, where the method needs statistics from data."
        ),
        "check_statistics": _described(
            {"enum": [True, False, *FLAGS, None]}, "Whether statistics must be of the weights that are merged."
        ),
        "keep_statistics": _described(
            _or_null(_TEXT), "Folder in which statistics that are made for this merge are kept."
        ),
    }


def _shared() -> Schema:
    """Return the definitions that the recipes of all methods share."""
    path = _object({"path": _TEXT, "revision": _or_null(_TEXT)}, required=["path"])
    task = "What restores this model, where the method keeps sidecars."
    folder = "What merganser calibrate wrote for this model, where the method needs statistics from data."
    of_base = "The same for the base, on the data of this model."
    model = {
        "model": _ref("reference"),
        "adapter": _ref("adapter"),
        "name": _described(_or_null({**_TEXT, "maxLength": 100}), task),
        "statistics": _described(_or_null(_TEXT), folder),
        "data": _described(_or_null(_ref("data")), "Data that this model is calibrated on."),
        "base_statistics": _described(_or_null(_TEXT), of_base),
        "parameters": _ref("parameters"),
    }
    layers: Schema = {"type": "array", "items": _ref("count"), "minItems": 2, "maxItems": 2}
    source = {
        "model": _ref("reference"),
        "adapter": _ref("adapter"),
        "layer_range": _described(layers, "First layer, and the one after the last."),
        "statistics": model["statistics"],
        "data": model["data"],
        "parameters": _ref("parameters"),
    }
    piece = {
        "sources": _list_of(_object(source, required=["model", "layer_range"])),
        "parameters": _ref("parameters"),
        "base_model": _or_null(_ref("reference")),
        "residual_weight": _described({}, "Has no effect.", deprecated=True),
    }
    based = _has("slices") | {"properties": {"slices": {"items": _has("base_model")}}}
    module_based = {"required": ["modules"], "properties": {"modules": {"additionalProperties": based}}}
    module = {key: _or_null(_ref(key)) for key in ("models", "slices")} | {"parameters": _ref("parameters")}
    return {
        "adapter": _described(_or_null({"anyOf": [_TEXT, _ref("path")]}), "An adapter on top of the model."),
        "reference": {
            "description": "path[@revision][+adapter[@revision]]",
            "anyOf": [_TEXT, _ref("path"), _ref("model")],
        },
        "path": path,
        "data": {"anyOf": [_TEXT, _list_of(_TEXT), _data()]},
        "model": _object(
            {
                "model": {"anyOf": [_TEXT, _ref("path")]},
                "lora": _ref("adapter"),
                "override_architecture": _or_null(_TEXT),
            },
            required=["model"],
        ),
        "models": _list_of(_object(model, required=["model"])),
        "slices": _list_of(_object(piece, required=["sources"])),
        "module": _object(module, required=[]) | {"oneOf": [_has("models"), _has("slices")]},
        "tokens": {"type": "object", "additionalProperties": _token()},
        "with.base": {"anyOf": [_has("base_model"), based, module_based]},
        "parameters": {"type": ["object", "null"]},
        "filter": _described(_or_null(_TEXT), "Part of the names of the tensors that the value is for."),
        "ignored": _described({}, "Accepted, as in mergekit; has no effect.", deprecated=True),
        "number": {"type": "string", "pattern": f"^({FLOAT.pattern})$", "maxLength": MAX_DIGITS},
        "count": {"anyOf": [{"type": "integer", "minimum": 0}, _ref("number")]},
    }


def _token() -> Schema:
    """Return the schema of the rule for one token."""
    kinds = [{"kind": {"const": kind}} for kind in ("zero", "mean")]
    other = {
        "kind": {"const": "model_token"},
        "model": _ref("reference"),
        "token": _or_null(_TEXT),
        "token_id": _or_null(_ref("count")),
    }
    source = [_ref("reference"), *(_object(each, required=["kind"]) for each in kinds)]
    source.append(_object(other, required=["kind", "model"]) | {"oneOf": [_has("token"), _has("token_id")]})
    return _object({"source": {"anyOf": source}, "force": {"enum": [*FLAGS, True, False, None]}}, required=["source"])


def _align() -> Schema:
    """Return the schema of the key `align`."""
    units: Schema = {"enum": list(ALIGN_UNITS)}
    given = {
        "to": _described(
            _or_null(_ref("reference")), "The model that keeps its order: 'base', or another of the recipe."
        ),
        "by": _described({"enum": [*ALIGN_BY, None]}, "What is compared."),
        "data": _described(_or_null(_ref("data")), "Data on which activations are compared."),
        "units": _described(
            {"anyOf": [units, {"type": "array", "items": units, "minItems": 1}, _NULL]}, "What may be permuted."
        ),
    }
    return _object(given, required=[])


def _gguf() -> Schema:
    """Return the schema of the key `gguf`."""
    kind: Schema = {"enum": list(GGUF_TYPES)}
    like = _described(_or_null(_TEXT), "GGUF file whose metadata are copied; by default, that of the donor.")
    return {"anyOf": [kind, _object({"type": kind, "metadata": like}, required=["type"]), _NULL]}


def _data() -> Schema:
    """Return the schema of the key `data` as a mapping."""
    told = {
        "files": "Texts (.txt), or text, prompt and completion, or messages (.jsonl, .parquet).",
        "dataset": "Name on the Hub, or folder, of a data set that the library datasets opens.",
        "subset": "Name of its configuration.",
        "split": "Name of its split; train by default.",
        "sequences": f"Sequences drawn from the data; {DEFAULT_SEQUENCES} by default, or all there are.",
        "length": f"Most tokens of a sequence; {DEFAULT_LENGTH} by default, or what the model can see.",
        "seed": "Seed of the draw.",
        "tokens": "Which tokens count.",
        "labels": "Tokens whose likelihood is the loss: those of the data, or sampled from the model.",
        "batch_tokens": "Tokens that are fed at once.",
    }
    values: Schema = {
        **dict.fromkeys(DATA_KEYS, _ref("count")),
        **dict.fromkeys(("dataset", "subset", "split"), _TEXT),
        "files": {"anyOf": [_TEXT, _list_of(_TEXT)]},
        "tokens": {"enum": [*COUNTED, None]},
        "labels": {"enum": [*LABELS, None]},
    }
    return _object({key: _described(_or_null(values[key]), told[key]) for key in DATA_KEYS}, required=[])


def _values(parameters: Iterable[Parameter]) -> Schema:
    """Return the schemas of each type of value, and of a setting: a scalar, a schedule, or either with filters."""
    schemas: Schema = {}
    for p in parameters:
        name = _type_name(p)
        if name not in schemas:
            value = _ref(f"{name}.value")
            rule = _ref(f"{name}.rule")
            fields = {"filter": _ref("filter"), "value": {"anyOf": [value, _list_of(value)]}}
            schemas[f"{name}.value"] = _value(p)
            schemas[f"{name}.rule"] = _object(fields, required=["value"])
            schemas[name] = {"anyOf": [value, _list_of(value), rule, _list_of(rule)]}
    return schemas


def _type_name(p: Parameter) -> str:
    """Return the name of a type of values, which equal types share: `number.from.0.to.1`."""
    if p.kind == "choice":
        return ".".join(["one", "of", *sorted(p.choices)])
    words: list[str] = [p.kind]
    if p.range is not None and math.isfinite(p.range.low):
        words += ["above" if p.range.open else "from", f"{p.range.low:g}"]
    if p.range is not None and math.isfinite(p.range.high):
        words += ["below" if p.range.open else "to", f"{p.range.high:g}"]
    return "any.number" if words == ["number"] else ".".join(words)


def _value(p: Parameter) -> Schema:
    if p.kind == "flag":
        return {"enum": [True, False, 0, 1, "0", "1", *FLAGS]}
    if p.kind == "choice":
        return {"enum": sorted(p.choices)}
    schema: Schema = {"type": p.kind}
    if p.range is not None:
        low, high = ("exclusiveMinimum", "exclusiveMaximum") if p.range.open else ("minimum", "maximum")
        schema |= {low: p.range.low} if math.isfinite(p.range.low) else {}
        schema |= {high: p.range.high} if math.isfinite(p.range.high) else {}
    return {"anyOf": [schema, _ref("number")]}


def _levels(method: MergeMethod) -> Schema:
    """Return the schema of every level of a recipe that may have parameters of the method."""
    inner = _ref(f"levels.of.{method.name}")
    lists = {key: {"items": inner} for key in ("models", "slices", "sources")}
    modules = {"modules": {"additionalProperties": inner}}
    return {"properties": {"parameters": _ref(method.name), **lists, **modules}}


def _rules_of(method: MergeMethod) -> Schema:
    """Return the rules for recipes of this method: the parameters of each level, and whether a base is required."""
    rules = [_ref(f"levels.of.{method.name}")] + [_ref("with.base")] * (method.base == "required")
    return {"if": {"properties": {"merge_method": {"const": method.name}}}, "then": {"allOf": rules}}


def _parameters(method: MergeMethod) -> Schema:
    """Return the schema of `parameters` at any level, for one method."""
    properties: Schema = {"int8_mask": _ref("ignored")}
    for name, why in method.ignored.items():
        properties[name] = _described({}, f"Has no effect: {why}", deprecated=True)
    for p in method.parameters.values():
        default = {} if p.required else {"default": p.default}
        properties[p.name] = _described(_ref(_type_name(p)), p.help, **default)
    return {"properties": properties, "additionalProperties": False}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _has(key: str) -> Schema:
    """Return the schema of a mapping in which the key exists and is not empty; an empty key counts as missing."""
    return {"required": [key], "properties": {key: {"not": _NULL}}}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _described(schema: Schema, description: str, **more: Any) -> Schema:
    return {**schema, "description": description, **more}
