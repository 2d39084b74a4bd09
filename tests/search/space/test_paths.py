"""Paths through layers: the slots, the recipes they become, what is refused, and a search among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from merganser.errors import RecipeError
from merganser.recipe import check_recipe, load_recipe
from merganser.search import search
from merganser.search.space.space import Space
from merganser.search.study import Study
from tests.cli.tiny import run

HEAD = "merge_method: passthrough\n"


def space(path: str) -> Space:
    return Space(f"{HEAD}path: {path}\n")


def slices(path: str, **point: float) -> Any:
    own = space(path)
    names = {d.name.partition("]")[0].removeprefix("path[") + d.name.partition("]")[2][-6:].replace(" scale", "s") * d.name.endswith("scale"): d.name for d in own.dimensions}  # fmt: skip
    found = yaml.safe_load(
        own.resolve(own.start() | {names[key.removeprefix("_")]: value for key, value in point.items()})
    )
    check_recipe(load_recipe(own.resolve(own.start())))
    assert "path" not in found
    return [each["sources"][0] for each in found["slices"]]


def test_slots_become_slices() -> None:
    path = "{models: [a, x/b], layers: 5, block: 2, repeat: 2}"
    assert [d.name for d in space(path).dimensions] == [
        "path[1] a 2-4", "path[2] a 4-5", "path[3] b 0-2", "path[4] b 2-4", "path[5] b 4-5", "path[6] a 0-2",
        "path[7] a 2-4", "path[8] a 4-5", "path[9] b 0-2", "path[10] b 2-4", "path[11] b 4-5",
    ]  # fmt: skip
    # a search begins with the first model as it is
    assert slices(path) == [{"model": "a", "layer_range": [0, 5]}]
    # 0 is use for the first model's first pass, and skip for all others
    assert slices(path, _2=1, _4=1, _5=1, _9=1) == [
        {"model": "a", "layer_range": [0, 4]},
        {"model": "x/b", "layer_range": [2, 5]},
        {"model": "x/b", "layer_range": [0, 2]},
    ]
    # the same layers again are a slice of their own
    assert slices(path, _1=1, _2=1, _6=1) == [{"model": "a", "layer_range": [0, 2]}] * 2


def test_a_scale_is_that_of_what_a_block_adds() -> None:
    path = "{models: [a, b], layers: 2, scale: {search: [0.5, 1.5]}}"
    assert slices(path) == [{"model": "a", "layer_range": [0, 2]}]
    found = slices(path, _3=1, _3s=0.75)
    assert found == [
        {"model": "a", "layer_range": [0, 2]},
        {
            "model": "b",
            "layer_range": [1, 2],
            "parameters": {"scale": [{"filter": "o_proj", "value": 0.75}, {"filter": "down_proj", "value": 0.75}, {"value": 1.0}]},
        },
    ]  # fmt: skip
    # of what is not used a scale has no value, and changes nothing
    own = space(path)
    assert set(own.start()) == {"path[1] a 1-2", "path[1] a 1-2 scale", "path[2] b 0-1", "path[3] b 1-2"}
    assert own.resolve(own.start()) == own.resolve(own.start() | {"path[3] b 1-2 scale": 0.6})
    (scale,) = [
        d for d in space("{models: [a], layers: 2, scale: {choices: [0.5, 1]}}").dimensions if d.name.endswith("scale")
    ]
    assert scale.choices == (1, 0.5)


@pytest.mark.parametrize("sampler", ["tpe", "random", "greedy", "m2n2", "nsga2"])
def test_values_that_hang_on_others(tmp_path: Path, sampler: str) -> None:
    own = space("{models: [a, b], layers: 2, repeat: 2, scale: {search: auto}}")

    def told(path: Path | None, cuts: tuple[int, ...] = ()) -> list[Any]:
        study = Study(path, own.dimensions, ["maximize"], sampler, 0, own.start())
        for number in range(16):
            asked = study.ask()
            if number in cuts:
                study = Study(path, own.dimensions, ["maximize"], sampler, 0, own.start())
                asked = study.ask()
            assert asked is not None
            for dimension in own.dimensions:
                assert (dimension.name in asked.point) == dimension.is_open(asked.point)
            value = sum(v for name, v in asked.point.items() if name.endswith("scale"))
            study.tell(asked, [value], {"scores": [value, 1.0]}, {})
        return [(each.point, each.values) for each in study.told]

    whole = told(None)
    assert len({str(point) for point, _ in whole}) > 8
    assert told(tmp_path / "t.log", (0, 3, 12)) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path: [a, b]",
            "<recipe>:2 path: expected a mapping with the keys models, layers, block, repeat, scale, got a list",
        ),
        ("path: {layers: 2}", "path: 'models' is missing"),
        ("path: {models: [a, b]}", "path: 'layers' is missing"),
        ("path: {models: a, layers: 2}", "path.models: expected a list"),
        ("path: {models: [a, a], layers: 2}", "path.models: a model is listed twice; 'repeat' offers its layers again"),
        ("path: {models: [a], layers: 0}", "path.layers: "),
        ("path: {models: [a, b], layers: 4, block: 5}", "path.block: a block of 5 layers, and the models have 4"),
        ("path: {models: [a, b], layers: 4, repeat: 0}", "path.repeat: "),
        ("path: {models: [a, b], layers: 400, repeat: 9}", "path: more than 1000 slots; make blocks larger"),
        ("path: {models: [a], layers: 4, block: 4}", "path: offers one block of one model, which leaves nothing open"),
        ("path: {models: [a, b], layers: 4, blocks: 2}", "unknown key 'blocks'. Did you mean 'block'?"),
        ("path: {models: [a, b], layers: 4, scale: 2}", "path.scale: expected a mapping with the keys search, choices"),
        ("path: {models: [a, b], layers: 4, scale: {choices: [a, 1]}}", "path.scale: a scale is a number, got 'a'"),
        (
            "path: {models: [a, b], layers: 4}\nmodels: [{model: a}]",
            "path: takes the place of 'models'; give one of them",
        ),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Space(HEAD + text + "\n")
    assert message in str(caught.value)


def test_other_methods_and_merges_refuse_it(tmp_path: Path) -> None:
    path = "path: {models: [a, b], layers: 2}\n"
    with pytest.raises(RecipeError, match="path: is for merge_method: passthrough"):
        Space(f"merge_method: linear\n{path}")
    (tmp_path / "r.yaml").write_text(HEAD + path)
    found = run("merge", tmp_path / "r.yaml", tmp_path / "out")
    assert found.code == 2
    assert "'path' leaves open which layers follow each other; find it with: merganser search" in found.err


def test_a_search(tmp_path: Path) -> None:
    recipe = f"{HEAD}path: {{models: [calm, b], layers: 2, scale: {{search: [0.8, 1.2]}}}}\n"
    found = search(recipe, tmp_path / "out", ["one.jsonl"], trials=4, sampler="random", dtype="float32", limit=8)
    assert [trial.failed for trial in found.trials] == [None] * 4
    assert [end.name for end in found.ends[1:]] == ["calm", "b"]
    depths = [
        sum(b - a for a, b in (s["sources"][0]["layer_range"] for s in yaml.safe_load(t.recipe)["slices"]))
        for t in found.trials
    ]
    assert len(set(depths)) > 1
