"""Free values of recipes: what they mean, the recipes they become, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from merganser.errors import RecipeError
from merganser.recipe import load_recipe, load_recipes
from merganser.search.space.space import Space

TIES = "merge_method: ties\nbase_model: base\n"


def resolved(text: str, **values: float) -> Any:
    space = Space(text)
    return yaml.safe_load(space.resolve(space.start() | values))


def test_a_number_takes_its_place() -> None:
    space = Space(
        TIES
        + "models: [{model: a, parameters: {weight: 1}}, {model: b}]\nparameters: {density: {search: [0.2, 0.6]}, weight: 1}\n"
    )
    (found,) = space.dimensions
    assert (found.name, found.low, found.high, found.integer) == ("parameters.density", 0.2, 0.6, False)
    assert yaml.safe_load(space.resolve({"parameters.density": 0.25}))["parameters"] == {"density": 0.25, "weight": 1}
    assert load_recipe(space.resolve({"parameters.density": 0.25})).merge_method == "ties"


def test_ranges_come_from_the_method() -> None:
    text = (
        TIES
        + "models: [{model: a}, {model: b}]\nparameters: {density: {search: auto}, weight: {search: auto}, rescale: {search: auto}}\n"
    )
    low_high = [(d.low, d.high, d.choices) for d in Space(text).dimensions]
    assert low_high == [(0.05, 1.0, None), (0.0, 1.0, None), (0, 1, (False, True))]


def test_per_model_leaves_out_the_base_and_those_with_their_own() -> None:
    text = TIES + (
        "models: [{model: base}, {model: x/a}, {model: b, parameters: {weight: 1}}, {model: c}]\n"
        "parameters: {density: 0.5, weight: {search: [0, 1], per: model}}\n"
    )
    space = Space(text)
    assert [d.name for d in space.dimensions] == ["parameters.weight[a]", "parameters.weight[c]"]
    recipe = yaml.safe_load(space.resolve({"parameters.weight[a]": 0.25, "parameters.weight[c]": 0.75}))
    assert [m.get("parameters") for m in recipe["models"]] == [None, {"weight": 0.25}, {"weight": 1}, {"weight": 0.75}]
    assert recipe["parameters"] == {"density": 0.5}
    # an equal share of three models
    assert [*space.start().values()] == pytest.approx([1 / 3, 1 / 3])


def test_per_layers_and_role() -> None:
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: {search: [0, 1], per: [role, layers:2]}}\n"
    space = Space(text)
    assert [d.name for d in space.dimensions] == [
        f"parameters.weight[{role}][{i}/2]" for role in ("attention", "mlp", "others") for i in (1, 2)
    ]
    point = {d.name: i / 10 for i, d in enumerate(space.dimensions)}
    assert yaml.safe_load(space.resolve(point))["parameters"]["weight"] == [
        {"filter": "attn", "value": [0.0, 0.1]},
        {"filter": "mlp", "value": [0.2, 0.3]},
        {"value": [0.4, 0.5]},
    ]


def test_choices_of_anything() -> None:
    text = "merge_method: {choices: [linear, karcher]}\nmodels: [{model: {choices: [a, c]}}, {model: b}]\nparameters: {weight: 1}\n"
    space = Space(text)
    recipe = yaml.safe_load(space.resolve({"merge_method": 1, "models[0].model": 1}))
    assert (recipe["merge_method"], recipe["models"][0]["model"]) == ("karcher", "c")


def test_steps_logs_and_whole_numbers() -> None:
    text = (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nrandom_seed: {search: [0, 9]}\n"
        "parameters: {weight: {search: [0.001, 10], log: true}}\n"
    )
    seed, weight = Space(text).dimensions
    assert (seed.integer, weight.log, weight.start(2)) == (True, True, pytest.approx(0.1))
    assert Space(text.replace("0.001, 10], log: true", "0, 1], step: 0.3")).start()["parameters.weight"] == 0.6


def test_several_documents() -> None:
    text = (
        "name: one\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: {search: [0, 1]}}\n---\n"
        "merge_method: slerp\nmodels: [{model: one}, {model: c}]\nparameters: {t: {search: [0, 1]}}\n"
    )
    space = Space(text)
    assert [d.name for d in space.dimensions] == ["1: parameters.weight", "2: parameters.t"]
    assert len(load_recipes(space.resolve(space.start()))) == 2


MODELS = "models: [{model: a}, {model: b}]\n"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("weight: 1", "<recipe>: leaves nothing open; write a value to find as {search: [low, high]} or"),
        ("weight: {search: [1, 0]}", "weight.search: a range ends above its beginning, got [1, 0]. Did you mean [0, 1]?"),
        ("weight: {search: [1, 1]}", "got [1, 1]. Write the value itself."),
        ("weight: {search: [0]}", "weight.search: expected [low, high], two numbers, or auto; got a list"),
        ("weight: {search: high}", "weight.search: expected [low, high], two numbers, or auto; got 'high'"),
        ("weight: {search: [0, one]}", "weight.search[1]: expected a number, got 'one'"),
        ("weight: {search: [0, true]}", "weight.search[1]: expected a number, got true"),
        ("weight: {search: }", "weight: 'search' is empty; give [low, high], or auto"),
        ("weight: {search: [0, 1], choices: [1, 2]}", "weight: give 'search' with a range, or 'choices', not both"),
        ("weight: {search: [0, 1], lag: true}", "unknown key 'lag'. Did you mean 'log'?"),
        ("weight: {search: [0, 1], log: true}", "weight.search: a logarithmic range begins above 0, got 0"),
        ("weight: {search: auto, log: true}", "weight: a logarithmic range begins above 0; give [low, high]"),
        ("weight: {search: [0.1, 1], log: true, step: 0.1}", "weight.step: a logarithmic range has no step; leave 'step' or 'log' out"),
        ("weight: {search: [0, 1], step: 2}", "weight.step: must be above 0 and fit into the range, got 2"),
        ("weight: {search: [0, 1], per: head}", "weight.per: expected model, role, or layers:N with N of at least 2; got 'head'"),
        ("weight: {search: [0, 1], per: layers:1}", "expected model, role, or layers:N with N of at least 2"),
        ("weight: [{search: [0, 1], per: model}, 1]", "weight[0].per: 'per' is for the value of a parameter as a whole"),
        ("weight: {choices: [1]}", "weight.choices: a list of one choice; give two or more, or write the value itself"),
        ("weight: {choices: [1, 2, 1]}", "weight.choices: 1 is listed twice"),
        ("weight: {choices: [1, 2], step: 1}", "weight.step: 'step' is for a range; choices have none"),
        ("weight: {choices: [1, high]}", "weight.choices: weight must be any finite number, got 'high'"),
        ("weight: 1, density: {search: [0, 2]}", "density.search: 2 is out of range: density must be a number between 0 and 1"),
        ("weight: 1, density: 1, dense: {search: [0, 1]}", "Did you mean 'density'?"),
        ("weight: 1, density: 1, rescale: {search: [0, 1]}", "rescale.search: rescale is true or false, which has no range"),
        ("weight: 1, density: 1, lambda: {search: [0, 1], per: model}", "lambda is one value for all models of ties"),
    ],
)  # fmt: skip
def test_what_is_refused(rest: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Space(f"{TIES}{MODELS}parameters: {{{rest}}}\n")
    assert message in str(caught.value)


def test_a_key_without_a_known_range() -> None:
    with pytest.raises(RecipeError, match="no range to search is known for 'random_seed'; give one"):
        Space(f"merge_method: linear\n{MODELS}random_seed: {{search: auto}}\n")


def test_per_model_in_slices() -> None:
    text = "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nparameters: {weight: {search: [0, 1], per: model}}\n"
    with pytest.raises(RecipeError, match="in slices, write a free value for each source"):
        Space(text)


@pytest.mark.parametrize("value", ["{search: [0, 1]}", "{choices: [0, 1]}", "[0, {search: [0, 1]}]"])
def test_a_merge_names_the_search(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"merge_method: linear\n{MODELS}parameters:\n  weight: {value}\n")
    place = "parameters.weight[1]" if value.startswith("[") else "parameters.weight"
    assert str(caught.value) == (
        f"<recipe>:4 {place}: this value is left open, and a merge needs it; find it with: merganser search <recipe> OUT "
        "--tasks ..."
    )
