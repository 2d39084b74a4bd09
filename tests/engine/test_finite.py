"""NaN and infinity are named, wherever they stand, and merged on request only."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor

from merganser.engine.merge import merge
from merganser.errors import NonFiniteError
from merganser.method import merge_method, statistic
from tests.making import llama, llama_config, make_recipe, read_model, write_model

# in a bundle, and in a large tensor of several segments
NAMES = ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"]
RECIPES = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
}


def write(root, harm=None, dtype=torch.float32):
    paths = []
    for i in range(3):
        own = llama(i, dtype=dtype)
        if harm:
            harm(i, own)
        paths.append(write_model(root / f"m{i}", own, llama_config()))
    return paths


def recipe_of(method, paths, **keys):
    return make_recipe(method, paths[1:], None if method == "linear" else paths[0], RECIPES[method], **keys)


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_the_culprit_is_named(tmp_path, small_blocks, method, name, value):
    def harm(i, own):
        if i == 2:
            own[name].view(-1)[-1] = float(value)

    paths = write(tmp_path / "models", harm)
    expected = f"{paths[2] / 'model.safetensors'}: tensor {name!r} holds NaN or infinity; merge it all the same with"
    with pytest.raises(NonFiniteError, match=re.escape(expected) + " --allow-nonfinite"):
        merge(recipe_of(method, paths), tmp_path / "out", threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("method", RECIPES)
def test_on_request_they_are_merged(tmp_path, small_blocks, method):
    def harm(i, own):
        for name in NAMES:
            own[name].view(-1)[i] = (float("nan"), float("inf"), float("-inf"))[i]

    result = merge(recipe_of(method, write(tmp_path, harm)), tmp_path / "out", allow_nonfinite=True)
    clean = read_model(merge(recipe_of(method, write(tmp_path / "clean")), tmp_path / "clean" / "out").out)
    for name, tensor in read_model(result.out).items():
        if name not in NAMES:
            assert torch.equal(tensor, clean[name])
    assert not all(torch.isfinite(read_model(result.out)[name]).all() for name in NAMES)
    # JSON has no word for them
    record = (result.out / "merge.json").read_text()
    json.loads(record, parse_constant=lambda word: pytest.fail(f"{word} in the record"))


@pytest.mark.parametrize("name", NAMES)
def test_an_overflow_of_the_result_is_told_from_bad_inputs(tmp_path, small_blocks, name):
    def harm(i, own):
        own[name].view(-1)[5] = 6e4

    paths = write(tmp_path, harm, torch.float16)
    recipe = make_recipe("linear", paths, parameters={"weight": 1.0, "normalize": False})
    expected = f"{name}: the merged tensor is not finite, though its inputs are: it overflows float16"
    with pytest.raises(NonFiniteError, match=re.escape(expected)):
        merge(recipe, tmp_path / "out")
    wider = read_model(merge({**recipe, "out_dtype": "bfloat16"}, tmp_path / "wide").out)
    assert wider[name].view(-1)[5] == torch.tensor(1.8e5).bfloat16()
    kept = read_model(merge(recipe, tmp_path / "kept", allow_nonfinite=True).out)
    assert kept[name].view(-1)[5] == float("inf")


def test_a_float32_input_beyond_the_range_of_the_output(tmp_path):
    def harm(i, own):
        own["model.norm.weight"][0] = 1e30

    with pytest.raises(NonFiniteError, match="it overflows float16"):
        merge(recipe_of("linear", write(tmp_path, harm), out_dtype="float16"), tmp_path / "out")


def mean_of_all(models: list[Tensor]) -> Tensor:
    """Measure the sum."""
    return models[0].double().sum()


def picky(measured: Tensor) -> Tensor:
    """Solve, as linear algebra does, with finite numbers only."""
    assert measured.isfinite().all()
    return measured


@merge_method(family="toys", cite="-", statistics={"total": statistic(mean_of_all, picky)})
def toy(models: list[Tensor], total: Tensor) -> Tensor:
    """Add the sum."""
    return models[0] + total


@pytest.mark.parametrize("name", NAMES)
def test_a_solver_never_sees_them(tmp_path, small_blocks, monkeypatch, name):
    def harm(i, own):
        own[name].view(-1)[-1] = float("nan")

    paths = write(tmp_path, harm)
    monkeypatch.setattr("merganser.method.registry.get_method", lambda name: toy)
    with pytest.raises(NonFiniteError, match=re.escape(f"tensor {name!r} holds NaN or infinity")):
        merge(make_recipe("linear", paths), tmp_path / "out")
