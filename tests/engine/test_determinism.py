"""Same inputs, same recipe, same seed: same bytes, whatever the machine and the layout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from merganser.engine.merge import merge, plan
from tests.making import assert_equal, make_recipe, read_files, read_json, read_model, write_llamas

RECIPES = {
    "linear": {"weight": 0.6},
    "ties": {"weight": 0.6, "density": 0.4},
    "dare_ties": {"weight": 0.6, "density": 0.4},
    "della_linear": {"weight": 0.6, "density": 0.4},
}


def recipe_of(name, paths):
    return make_recipe(name, paths[1:], None if name == "linear" else paths[0], RECIPES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_threads_and_memory_do_not_change_a_byte(tmp_path, name):
    recipe = recipe_of(name, write_llamas(tmp_path))
    options = [{"threads": 1}, {"threads": 2}, {"threads": 4}, {"threads": 4, "max_memory": 340_000_000}]
    outs = [merge(recipe, tmp_path / str(i) / "out", **own).out for i, own in enumerate(options)]
    first, *others = (read_files(out) for out in outs)
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", RECIPES)
def test_tensors_do_not_depend_on_the_size_of_shards(tmp_path, name):
    recipe = recipe_of(name, write_llamas(tmp_path))
    results = [merge(recipe, tmp_path / f"out{size}", out_shard_size=size) for size in (10**9, 4000, 1)]
    shards = [len(list(result.out.glob("*.safetensors"))) for result in results]
    assert shards[0] == 1
    assert 1 < shards[1] < 21
    assert shards[2] == 21
    for result in results[1:]:
        assert_equal(read_model(result.out), read_model(results[0].out))
    total = sum(tensor.nbytes for tensor in read_model(results[0].out).values())
    assert read_json(results[1].out, "model.safetensors.index.json")["metadata"]["total_size"] == total


def test_seed_decides_random_methods_alone(tmp_path):
    paths = write_llamas(tmp_path)
    for name, moves in (("linear", False), ("dare_ties", True)):
        found = [
            read_model(merge(recipe_of(name, paths), tmp_path / f"{name}{i}", seed=seed).out)
            for i, seed in enumerate((0, 1, 0))
        ]
        assert_equal(found[2], found[0])
        same = [bool((found[0][key] == found[1][key]).all()) for key in found[0]]
        assert all(same) is not moves


def test_the_recipe_may_name_the_seed(tmp_path):
    paths = write_llamas(tmp_path)
    recipe = recipe_of("dare_ties", paths)
    by_recipe = merge({**recipe, "random_seed": 5}, tmp_path / "a")
    by_option = merge(recipe, tmp_path / "b", seed=5)
    assert by_recipe.record["seed"] == 5
    assert_equal(read_model(by_recipe.out), read_model(by_option.out))
    assert plan({**recipe, "random_seed": 5}, seed=6).seed == 6


SCRIPT = """
import sys
from merganser import merge
for method in ("dare_ties", "tsv_m", "optmerge"):
    merge(f"{method}.yaml", f"{sys.argv[1]}/{method}", threads=2)
"""


def test_the_environment_does_not_matter(tmp_path):
    """Neither Python's hash seed nor the threads of OpenMP, on which products of matrices depend."""
    base, *models = write_llamas(tmp_path)
    settings = {"dare_ties": {"density": 0.4, "weight": [0.2, 0.9]}, "tsv_m": None, "optmerge": None}
    for method, parameters in settings.items():
        recipe = make_recipe(method, models, base, parameters)
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(recipe))
    for seed, threads in (("1", "1"), ("2", "5")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT, seed], check=True, env=environment, cwd=tmp_path)
    for method in settings:
        one, other = (read_files(tmp_path / seed / method) for seed in ("1", "2"))
        assert one == other, method
