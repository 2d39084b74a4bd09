"""Coefficients that are learnt by gradients of the whole merged model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merganser.calibration.learning import learn_coefficients
from merganser.calibration.learning.sequences import of_step
from merganser.calibration.preparation import prepare
from merganser.engine.planner import build_plan
from merganser.recipe import load_recipe
from merganser.statistics import Statistics
from tests.calibration.merging import LENGTH, Family, choice, make_family
from tests.reference.adamerging import adamerging_steps
from tests.reference.dam import dam_steps

ALL = 99


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


def written(family: Family, method: str, **parameters: Any) -> dict[str, Any]:
    """A recipe in which each model has its data."""
    recipe = family.recipe(method, **parameters)
    for entry, data in zip(recipe["models"], family.data, strict=True):
        entry["data"] = {"files": str(data), "length": LENGTH}
    if method == "dam":
        del recipe["base_model"]
    return recipe


def learn(family: Family, method: str, out: Path, weight: Any = None, **parameters: Any) -> list[Statistics]:
    recipe = family.recipe(method, **parameters)
    for entry, own in zip(recipe["models"], weight or [], strict=False):
        entry["parameters"] = {"weight": own}
    if method == "dam":
        del recipe["base_model"]
    with ExitStack() as stack:
        prepared = [
            stack.enter_context(prepare(model, [data], choice=choice()))
            for model, data in zip(family.models, family.data, strict=True)
        ]
        return learn_coefficients(build_plan(load_recipe(recipe), measured=False), prepared, out)


def coefficients(found: list[Statistics]) -> dict[str, torch.Tensor]:
    """By tensor, shape [models, ...]."""
    parts = [
        {name: t for file in own.about["files"] for name, t in load_file(own.path / file).items()} for own in found
    ]
    names = [name for name in parts[0] if name.startswith("coefficients/")]
    return {name.removeprefix("coefficients/"): torch.stack([own[name] for own in parts]) for name in names}


def losses(found: list[Statistics]) -> list[list[float]]:
    """By step and model."""
    return [list(step) for step in zip(*(own.about["learning"]["losses"] for own in found), strict=True)]


def double(family: Family) -> tuple[Any, list[Any], list[Any]]:
    """Base, models, and all their data for each of three steps."""
    models = [family.open(model).double() for model in family.models]
    return family.open(family.base).double(), models, [[family.sequences(0), family.sequences(1)]] * 3


def compare(family: Family, found: list[Statistics], expected: Any, history: Any, start: float) -> None:
    learnt = coefficients(found)
    assert learnt.keys() == expected.keys()
    assert max(float((own - start).abs().max()) for own in expected.values()) > 0.05
    for name, own in expected.items():
        torch.testing.assert_close(
            learnt[name].double().reshape(own.shape),
            own,
            rtol=0,
            atol=2e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    torch.testing.assert_close(torch.tensor(losses(found)), torch.tensor(history), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("by", "objective"), [("tensor", "entropy"), ("layer", "entropy"), ("model", "likelihood")])
def test_adamerging_agrees_with_whole_models_in_memory(llama: Family, tmp_path: Path, by: str, objective: str) -> None:
    given = {"steps": 3, "rate": 0.03, "start": 0.3, "objective": objective, "weight": [1.0, 0.5]}
    found = learn(llama, "adamerging", tmp_path / "run", by=by, batch=ALL, **given)
    group = {"tensor": str, "layer": lambda name: name[:15] if ".layers." in name else "", "model": lambda name: ""}[by]
    compare(llama, found, *adamerging_steps(*double(llama), group=group, **given), start=0.3)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_dam_agrees_with_whole_models_in_memory(name: str, tmp_path: Path) -> None:
    family = make_family(tmp_path, name)
    given = {"steps": 3, "rate": 0.03, "temperature": 2.0, "similarity": 0.2, "overlap": 0.01}
    found = learn(family, "dam", tmp_path / "run", batch=ALL, **given)
    compare(family, found, *dam_steps(*double(family)[1:], **given), start=0.5)


def test_a_step_takes_the_next_sequences() -> None:
    assert [of_step(step, 2, 5) for step in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert of_step(3, 9, 2) == [1, 0]
