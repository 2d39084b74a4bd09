"""A plan carried out in memory gives what would be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merganser
from merganser.checkpoint import Reader
from merganser.engine.in_memory.run import Memory, merge_to_state_dict
from merganser.engine.output import staging
from merganser.errors import CheckpointError, NonFiniteError
from tests.making import assert_equal, llama, llama_config, make_recipe, read_model, write_llamas, write_model


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("method", "base", "parameters"),
    [
        ("linear", False, {"weight": 1.0}),
        ("ties", True, {"weight": 0.5, "density": 0.5}),
        ("ties", True, {"weight": 0.5, "density": 0.5, "trim_over": "model"}),
        ("dare_linear", True, {"weight": 0.5, "density": 0.5}),
    ],
)
def test_the_bytes_that_are_written(
    tmp_path: Path, method: str, base: bool, parameters: dict[str, object], threads: int
) -> None:
    origin, *models = write_llamas(tmp_path, 3, hidden=96)
    recipe = make_recipe(method, models, origin if base else None, parameters, dtype="bfloat16")
    options = {"threads": threads, "out_shard_size": 20_000}
    plan = merganser.plan(recipe, **options)
    written = merganser.merge(recipe, tmp_path / "out", **options).out
    assert len(list(written.glob("*.safetensors"))) > 1
    assert_equal(merge_to_state_dict(plan), read_model(written))
    assert_equal(merge_to_state_dict(plan, memory=Memory()), read_model(written))


def test_whole_numbers_and_mixed_dtypes(tmp_path: Path) -> None:
    models = []
    for seed in range(2):
        tensors = llama(seed, dtype=torch.bfloat16)
        tensors["steps"] = torch.tensor([3, 5, 7], dtype=torch.uint8)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        models.append(write_model(tmp_path / f"m{seed}", tensors, llama_config()))
    recipe = make_recipe("linear", models, parameters={"weight": 1.0})
    written = read_model(merganser.merge(recipe, tmp_path / "out").out)
    for memory in (None, Memory()):
        assert_equal(merge_to_state_dict(merganser.plan(recipe), memory=memory), written)


def test_merges_share_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = write_llamas(tmp_path, 2)
    half = [{"sources": [{"model": str(models[1]), "layer_range": [0, 1]}]}]
    recipes = [
        make_recipe("linear", models, parameters={"weight": weight, "normalize": False}) for weight in (0.5, 2.0)
    ]
    recipes.append(merganser.load_recipe({"merge_method": "passthrough", "slices": half}))
    written = [read_model(merganser.merge(recipe, tmp_path / f"out{i}").out) for i, recipe in enumerate(recipes)]
    monkeypatch.setattr(Reader, "read_into", None)
    memory, places = Memory(), []
    for number in (0, 1, 2, 0):
        found = merge_to_state_dict(merganser.plan(recipes[number]), memory=memory)
        assert_equal(found, written[number])
        places.append(found["model.norm.weight"].data_ptr())
    assert places[0] == places[1]


def test_files_that_changed_are_mapped_anew(tmp_path: Path) -> None:
    first, second = write_llamas(tmp_path, 2)
    recipe, memory = make_recipe("linear", [first, second], parameters={"weight": 1.0}), Memory()
    before = merge_to_state_dict(merganser.plan(recipe), memory=memory)["model.norm.weight"].clone()
    save_file(llama(9), first / "model.safetensors", {"format": "pt"})
    found = merge_to_state_dict(merganser.plan(recipe), memory=memory)
    assert_equal(found, read_model(merganser.merge(recipe, tmp_path / "out").out))
    assert not torch.equal(found["model.norm.weight"], before)
    plan = merganser.plan(recipe)
    os.truncate(first / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="truncated: the file ends at byte"):
        merge_to_state_dict(plan, memory=memory)


def test_numbers_at_odd_places_of_mapped_files(tmp_path: Path) -> None:
    models = write_llamas(tmp_path, 2)
    file = models[0] / "model.safetensors"
    data = file.read_bytes()
    # one more byte of the header moves all numbers by one
    file.write_bytes(
        (int.from_bytes(data[:8], "little") + 1).to_bytes(8, "little") + data[8:].replace(b"}}", b"}} ", 1)
    )
    recipe = make_recipe("linear", models, parameters={"weight": 1.0})
    found = merge_to_state_dict(merganser.plan(recipe), memory=Memory())
    assert_equal(found, read_model(merganser.merge(recipe, tmp_path / "out").out))


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = write_llamas(tmp_path, 2)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(staging, "write_at", None)
    merge_to_state_dict(merganser.plan(make_recipe("linear", models, parameters={"weight": 1.0})))
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_arrive(tmp_path: Path) -> None:
    good = write_llamas(tmp_path, 1)[0]
    tensors = llama(7)
    tensors["model.norm.weight"][3] = float("nan")
    bad = write_model(tmp_path / "bad", tensors, llama_config())
    plan = merganser.plan(make_recipe("linear", [good, bad], parameters={"weight": 1.0}))
    with pytest.raises(NonFiniteError, match=r"bad/model\.safetensors: tensor 'model\.norm\.weight'"):
        merge_to_state_dict(plan)
    assert merge_to_state_dict(plan, allow_nonfinite=True)["model.norm.weight"].isnan().sum() == 1
