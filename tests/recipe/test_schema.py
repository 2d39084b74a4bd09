"""The JSON schema accepts what loads, and marks what editors can mark."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from merganser.method.registry import methods
from merganser.recipe import json_schema
from merganser.recipe.document import parse_text, plain

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*(ROOT / "recipes").rglob("*.yaml"), *Path(__file__).with_name("wild").glob("*.yaml")])


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def documents(file: Path) -> Iterator[Any]:
    return (plain(document.root) for document in parse_text(file.read_text(encoding="utf-8"), str(file)))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_valid(validator: Draft202012Validator, file: Path) -> None:
    for document in documents(file):
        assert [error.message for error in validator.iter_errors(document)] == []


GOOD = {
    "merge_method": "ties",
    "base_model": "a",
    "models": [{"model": "b", "parameters": {"weight": 1, "density": [0.5, {"filter": "x", "value": 1}][0]}}],
    "parameters": {"normalize": 1, "trim_over": "model", "lambda": [{"filter": "x", "value": [1, 2]}, {"value": 3}]},
    "dtype": None,
}
SLICES = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}], "parameters": None, "residual_weight": 1}],
}


def changed(recipe: dict[str, Any], path: list[str | int], value: object) -> dict[str, Any]:
    result = copy.deepcopy(recipe)
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return result


@pytest.mark.parametrize(
    ("recipe", "path", "value"),
    [
        (GOOD, ["merge_methd"], "ties"),
        (GOOD, ["merge_method"], "tis"),
        (GOOD, ["models"], []),
        (GOOD, ["models", 0, "weight"], 1),
        (GOOD, ["models", 0, "model"], 7),
        (GOOD, ["models", 0, "parameters", "denisty"], 1),
        (GOOD, ["models", 0, "parameters", "density"], 1.5),
        (GOOD, ["models", 0, "parameters", "density"], [0.5, "x"]),
        (GOOD, ["models", 0, "parameters", "density"], [{"filter": "x", "value": -1}]),
        (GOOD, ["models", 0, "parameters", "density"], {"fliter": "x", "value": 1}),
        (GOOD, ["models", 0, "parameters", "weight"], []),
        (GOOD, ["parameters", "normalize"], "maybe"),
        (GOOD, ["parameters", "trim_over"], "modl"),
        (GOOD, ["parameters", "select_topk"], 0.5),
        (GOOD, ["slices"], SLICES["slices"]),
        (GOOD, ["dtype"], "bf16"),
        (GOOD, ["compat"], "mergkit"),
        (GOOD, ["base_model"], {"path": "a", "rev": "b"}),
        (SLICES, ["merge_method"], "ties"),
        (SLICES, ["slices", 0, "sources", 0, "layer_range"], [0, -1]),
        (SLICES, ["slices", 0, "sources", 0, "layer_range"], [0]),
        (SLICES, ["slices", 0, "sources", 0], {"model": "a"}),
        (SLICES, ["slices", 0, "sources", 0, "parameters"], {"sclae": 1}),
        (SLICES, ["slices", 0, "parameters"], {"sclae": 1}),
    ],
)
def test_mistakes_are_marked(
    validator: Draft202012Validator, recipe: dict[str, Any], path: list[str | int], value: object
) -> None:
    assert validator.is_valid(recipe)
    assert not validator.is_valid(changed(recipe, path, value))


def test_every_method_and_parameter_is_described() -> None:
    schema = json_schema()
    named = {choice["const"]: choice["description"] for choice in schema["properties"]["merge_method"]["oneOf"]}
    assert named == {name: method.doc.summary for name, method in methods().items()}
    for name, method in methods().items():
        described = schema["$defs"][name]["properties"]
        assert {p.name: p.help for p in method.parameters.values()}.items() <= {
            key: value["description"] for key, value in described.items()
        }.items()
