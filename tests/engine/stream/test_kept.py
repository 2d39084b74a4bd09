"""Inputs that are looked at several times are read once where they fit, and the plan says what they take."""

from __future__ import annotations

import math
import threading
from collections import Counter
from pathlib import Path

import pytest

from merganser.checkpoint import Reader
from merganser.engine.in_memory.run import Memory, merge_to_state_dict
from merganser.engine.merge import merge, plan
from merganser.engine.plan import memory
from merganser.engine.plan.memory import kept_bytes
from merganser.engine.stream.buffers import InputCache
from tests.engine.interrupting import shrink_blocks
from tests.engine.stream.test_schedule import sparse
from tests.making import (
    assert_equal,
    llama,
    llama_config,
    make_recipe,
    read_files,
    read_model,
    write_llamas,
    write_model,
)

RECIPES = {
    "ties": {"weight": 0.6, "density": 0.4},
    "breadcrumbs": {"weight": 0.6, "density": 0.6, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
}


@pytest.fixture
def reads(monkeypatch):
    """How often each byte of each input was read, on average, by file and tensor."""
    found: Counter[tuple[Path, str]] = Counter()
    lock = threading.Lock()
    read_into = Reader.read_into

    def counted(self, tensor, start, buffer):
        with lock:
            found[tensor.file, tensor.name] += len(buffer) / tensor.nbytes
        read_into(self, tensor, start, buffer)

    monkeypatch.setattr(Reader, "read_into", counted)
    return found


def recipe_of(name, paths, **more):
    return make_recipe(name, paths[1:], paths[0], {**RECIPES[name], **more})


def large_ones(found):
    """Return the names of the tensors of several blocks."""
    names = {tensor.name for tensor in found.tensors if tensor.size > tensor.block}
    assert names
    return names


def times(reads, names):
    """Return how often tensors were read."""
    return {round(read, 6) for (_, name), read in reads.items() if name in names}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_what_fits_is_read_once(tmp_path, small_blocks, monkeypatch, reads, name, threads):
    recipe = recipe_of(name, write_llamas(tmp_path))
    found = plan(recipe, threads=threads)
    large = large_ones(found)
    assert found.passes > 2
    kept = merge(recipe, tmp_path / "kept" / "out", threads=threads).out
    if threads == 1:
        assert times(reads, large) == {1}
    reads.clear()
    monkeypatch.setattr(memory, "_KEEP_INPUTS", 0)
    again = merge(recipe, tmp_path / "again" / "out", threads=threads).out
    assert times(reads, large) == {found.passes}
    assert read_files(again) == read_files(kept)


def test_a_state_dict_is_made_of_what_is_kept(tmp_path, small_blocks, reads):
    recipe = recipe_of("ties", write_llamas(tmp_path))
    planned = plan(recipe, threads=1)
    found = merge_to_state_dict(planned)
    assert times(reads, large_ones(planned)) == {1}
    assert_equal(found, read_model(merge(recipe, tmp_path / "out").out))
    reads.clear()
    mapped = merge_to_state_dict(planned, memory=Memory())
    assert not reads
    assert_equal(mapped, found)


def test_what_is_measured_over_the_model_is_not_kept(tmp_path, small_blocks, reads):
    recipe = recipe_of("ties", write_llamas(tmp_path), trim_over="model")
    found = plan(recipe)
    assert found.kept == 0
    merge(recipe, tmp_path / "out")
    assert times(reads, large_ones(found)) == {3}


@pytest.mark.parametrize("over", ["tensor", "model"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_a_pass_that_would_find_nothing_new_is_left_out(tmp_path, monkeypatch, reads, method, over):
    """Differences of numbers on a grid are numbers of bfloat16, among which the first count finds the cut."""
    paths = [
        write_model(tmp_path / f"m{i}", {name: (64 * x).round() / 64 for name, x in llama(i).items()}, llama_config())
        for i in range(3)
    ]
    recipe = recipe_of(method, paths, **({"trim_over": over} if method == "ties" else {"by": "tensor"}))
    whole = read_model(merge(recipe, tmp_path / "whole").out)
    shrink_blocks(monkeypatch)
    monkeypatch.setattr(memory, "_KEEP_INPUTS", 0)
    reads.clear()
    found = merge(recipe, tmp_path / "out", threads=2).out
    large = large_ones(plan(recipe))
    assert times(reads, large) == {2}
    assert plan(recipe).passes == 3
    assert_equal(read_model(found), whole)


SHAPES = {"model.embed_tokens.weight": (32000, 2048), "model.layers.0.mlp.up_proj.weight": (2048, 4096)}


def test_the_plan_says_what_is_kept(tmp_path):
    small, large = (math.prod(shape) * 3 * 2 for shape in reversed(SHAPES.values()))
    paths = sparse(tmp_path, 3, SHAPES)
    recipe = recipe_of("ties", paths)
    found = plan(recipe, threads=2)
    assert found.kept == small
    assert large > 64 << 20
    least = memory.estimate_memory(found.tensors, 2, found.fused)
    assert found.peak_memory == least + 2 * small
    enough, tight = (plan(recipe, threads=2, max_memory=least + 2 * small - less) for less in (0, 1))
    assert (enough.workers, enough.kept) == (2, small)
    assert enough.peak_memory == enough.max_memory
    assert (tight.workers, tight.kept) == (2, 0)
    # nothing is looked at twice
    assert plan(recipe_of("ties", paths, density=1.0)).kept == 0
    assert plan(make_recipe("linear", paths, parameters={"weight": 1})).kept == 0


def test_places_are_taken_and_given_back(tmp_path):
    embedding, layer = plan(recipe_of("ties", sparse(tmp_path, 3, SHAPES))).tensors
    places = InputCache(2, kept_bytes(layer))
    assert places.take(embedding) is None
    first, second = places.take(layer), places.take(layer)
    assert first is not None
    assert second is not None
    assert first.memory.data_ptr() != second.memory.data_ptr()
    assert places.take(layer) is None
    places.give_back(first)
    third = places.take(layer)
    assert third is not None
    assert third.memory is first.memory
    assert InputCache(2, 0).take(layer) is None
