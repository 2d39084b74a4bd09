"""The JSON schema accepts what loads, and marks what editors can mark."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from merganser.errors import MergeError
from merganser.method.registry import every_method
from merganser.recipe import check_recipe, json_schema, load_recipe
from merganser.recipe.document.parsing import parse_text, plain
from tests.cli.tiny import run

LINE = "# yaml-language-server: $schema="
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


def test_the_installed_schema_is_named_and_printed() -> None:
    found = run("schema")
    file = Path(found.out.rstrip("\n"))
    assert (
        found.err == f"note: an editor with the YAML language server checks a recipe that has this line: {LINE}{file}\n"
    )
    own = json.loads(file.read_text(encoding="utf-8"))
    assert run("schema", "--json").json == {"path": str(file), "id": own["$id"], "line": f"{LINE}{file}"}
    assert own["$id"] == "urn:merganser:recipe"
    assert run("schema", "--print").json == own


def test_every_method_and_parameter_is_described() -> None:
    schema = json_schema()
    named = {choice["const"]: choice["description"] for choice in schema["properties"]["merge_method"]["oneOf"]}
    assert named == {name: method.doc.summary for name, method in every_method().items()}
    for name, method in every_method().items():
        described = schema["$defs"][name]["properties"]
        assert {p.name: p.help for p in method.parameters.values()}.items() <= {
            key: value.get("description") for key, value in described.items()
        }.items()


def values(name: str) -> st.SearchStrategy[Any]:
    """Values of a parameter in every form."""
    numbers = st.sampled_from([0, 1, 0.5, 1.0, "0.5", "1", 1e-4, "1e-4", 2])
    flags = st.sampled_from([True, False, 0, 1, "true", "No", "1"])
    one = {"normalize": flags, "rescale": flags, "trim_over": st.sampled_from(["tensor", "model"])}.get(name, numbers)
    some = one | st.lists(one, min_size=1, max_size=3)
    rule = st.fixed_dictionaries({"value": some}, optional={"filter": st.sampled_from(["mlp", "*", None])})
    return st.one_of(some, some, rule, st.lists(rule, min_size=1, max_size=2))


REFERENCES = [
    "a",
    "b",
    "c@main",
    {"path": "d"},
    {"path": "e", "revision": None},
    {"model": "f"},
    {"model": {"path": "g+h"}},
]
TAKEN = {
    "linear": ["weight", "normalize"],
    "karcher": ["max_iter"],
    "passthrough": ["scale"],
    "ties": ["weight", "density", "normalize", "trim_over"],
    "della": ["weight", "density", "rescale", "lambda"],
}


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mappings that may have these fields, or have them empty."""
    return st.fixed_dictionaries({}, optional={name: value | st.none() for name, value in fields.items()})


@st.composite
def good_recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Recipes of which most load."""
    method = draw(st.sampled_from(list(TAKEN)))
    several = method != "passthrough"
    settings = st.fixed_dictionaries({}, optional={name: values(name) for name in [*TAKEN[method], "int8_mask"]})
    chosen = draw(st.lists(st.sampled_from(REFERENCES), min_size=1, max_size=3 if several else 1, unique_by=str))
    ranges = st.sampled_from([[0, 2], ["0", 2.0], [2, 4]])
    parts = [{"model": model, **draw(optional(parameters=settings))} for model in chosen]
    sliced = [part | {"layer_range": draw(ranges)} for part in parts]
    whole = {"models": parts} | draw(optional(parameters=settings, slices=st.none()))
    stacked = {"slices": [{"sources": sliced} | draw(optional(parameters=settings, residual_weight=st.just(1)))]}
    modules = [{"default": whole}, {"default": stacked}, {"text_decoder": whole, "vision_tower": stacked}]
    body = draw(st.sampled_from([whole, stacked, *({"modules": each} for each in modules)]))
    required = {"weight": draw(st.sampled_from([1, "0.5", [{"value": 2}]]))} if "weight" in TAKEN[method] else {}
    base = {} if method in ("linear", "karcher", "passthrough") else {"base_model": "base"}
    head = optional(
        name=st.just("stage"),
        dtype=st.just("bfloat16"),
        tokenizer=st.sampled_from(
            [
                {"source": "base"},
                {"source": "base", "tokens": {}, "pad_to_multiple_of": None},
                {"tokens": {"x": {"source": {"kind": "zero"}, "force": True}}, "pad_to_multiple_of": 8},
            ]
        ),
        chat_template=st.sampled_from(["auto", "{{ messages }} and some more"]),
        random_seed=st.sampled_from([0, "7", 3.0]),
    )
    return {"merge_method": method, "parameters": required, **base, **draw(head), **body}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(good_recipes())
def test_what_loads_is_valid(validator: Draft202012Validator, recipe: dict[str, Any]) -> None:
    try:
        check_recipe(load_recipe(recipe))
    except MergeError:
        event("refused")
        return
    event("loads")
    assert [error.message for error in validator.iter_errors(recipe)] == []
