"""The JSON schema of recipes, for editors; generated from the registry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .load import DTYPES
from .templates import AUTO, CHAT_TEMPLATES

if TYPE_CHECKING:
    from ..method import MergeMethod, Parameter

Schema = dict[str, Any]

_FLAG: Schema = {"enum": [True, False, 0, 1]}
_PARAMETERS: Schema = {"type": ["object", "null"]}
_REFERENCE: Schema = {"$ref": "#/$defs/reference"}


def json_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of one recipe."""
    from ..method.registry import methods

    known = methods()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Merganser recipe",
        "type": "object",
        "required": ["merge_method"],
        "oneOf": [{"required": ["models"]}, {"required": ["slices"]}],
        "additionalProperties": False,
        "properties": _properties(known),
        "allOf": [_rules_of(method) for method in known.values()],
        "$defs": {
            "reference": _reference(),
            **{name: _parameters(method) for name, method in known.items()},
        },
    }


def _properties(known: dict[str, MergeMethod]) -> Schema:
    dtype = {"enum": [*DTYPES, None]}
    task = _described(
        {"type": "string", "minLength": 1, "maxLength": 100},
        "What restores this model, where the method keeps sidecars.",
    )
    return {
        "name": _described({"type": "string"}, "Name of a stage, which later recipes of the file may use as a model."),
        "merge_method": {
            "oneOf": [{"const": name, "description": method.doc.summary} for name, method in known.items()]
        },
        "models": _list_of(_object({"model": _REFERENCE, "name": task, "parameters": _PARAMETERS}, required=["model"])),
        "slices": _list_of(_slice()),
        "base_model": _described(_REFERENCE, "The common ancestor; also lends config and tokenizer."),
        "parameters": _PARAMETERS,
        "dtype": _described(dtype, "Type that inputs are cast to when they are read."),
        "out_dtype": _described(dtype, "Type of the output."),
        "tokenizer_source": _described(_REFERENCE, "'base', or the model whose tokenizer the output gets."),
        "tokenizer": _object({"source": _REFERENCE}, required=["source"]),
        "chat_template": _described(
            {"type": "string", "minLength": 4}, f"{AUTO}, {', '.join(CHAT_TEMPLATES)}, or a Jinja template."
        ),
        "compat": _described({"enum": ["mergekit", None]}, "Reproduce mergekit where it differs from the papers."),
        "random_seed": {"type": "integer", "minimum": 0},
    }


def _slice() -> Schema:
    layer = {"type": "integer", "minimum": 0}
    source = _object(
        {
            "model": _REFERENCE,
            "layer_range": _described(
                {"type": "array", "items": layer, "minItems": 2, "maxItems": 2},
                "First layer, and the one after the last.",
            ),
            "parameters": _PARAMETERS,
        },
        required=["model", "layer_range"],
    )
    parts = {
        "sources": _list_of(source),
        "parameters": _PARAMETERS,
        "base_model": _REFERENCE,
        "residual_weight": _described({}, "Has no effect.", deprecated=True),
    }
    return _object(parts, required=["sources"])


def _reference() -> Schema:
    path = _object({"path": {"type": "string"}, "revision": {"type": ["string", "null"]}}, required=["path"])
    mapping = _object(
        {"model": {"anyOf": [{"type": "string"}, path]}, "override_architecture": {"type": ["string", "null"]}},
        required=["model"],
    )
    return {"description": "path[@revision]", "anyOf": [{"type": "string", "minLength": 1}, path, mapping]}


def _rules_of(method: MergeMethod) -> Schema:
    """Return what holds when the recipe names this method."""
    parameters = {"$ref": f"#/$defs/{method.name}"}
    each: Schema = {"items": {"properties": {"parameters": parameters}}}
    then: Schema = {
        "properties": {
            "parameters": parameters,
            "models": each,
            "slices": {"items": {"properties": {"parameters": parameters, "sources": each}}},
        }
    }
    if method.base == "required":
        in_slices = {"required": ["slices"], "properties": {"slices": {"items": {"required": ["base_model"]}}}}
        then["anyOf"] = [{"required": ["base_model"]}, in_slices]
    return {"if": {"properties": {"merge_method": {"const": method.name}}}, "then": then}


def _parameters(method: MergeMethod) -> Schema:
    """Return the schema of `parameters` at any level, for one method."""
    ignored = {"int8_mask": "Accepted, as in mergekit.", **method.ignored}
    properties = {name: _described({}, f"Has no effect: {why}", deprecated=True) for name, why in ignored.items()}
    properties |= {p.name: _setting(p) for p in method.parameters.values()}
    return {"properties": properties, "additionalProperties": False}


def _setting(p: Parameter) -> Schema:
    """Return the schema of a setting: a value, a layer schedule, or either with filters."""
    value = _value(p)
    values = {"anyOf": [value, _list_of(value)]}
    rule = _object({"filter": {"type": "string", "minLength": 1}, "value": values}, required=["value"])
    setting: Schema = {"anyOf": [value, _list_of(value), rule, _list_of(rule)]}
    if not p.required:
        setting["default"] = p.default
    return _described(setting, p.help)


def _value(p: Parameter) -> Schema:
    if p.kind == "flag":
        return _FLAG
    if p.kind == "choice":
        return {"enum": list(p.choices)}
    schema: Schema = {"type": p.kind}
    if p.range is not None:
        low, high = ("exclusiveMinimum", "exclusiveMaximum") if p.range.open else ("minimum", "maximum")
        schema |= {low: p.range.low} if math.isfinite(p.range.low) else {}
        schema |= {high: p.range.high} if math.isfinite(p.range.high) else {}
    return schema


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _described(schema: Schema, description: str, **more: Any) -> Schema:
    return {**schema, "description": description, **more}
