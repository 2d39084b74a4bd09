"""Branch-Train-Merge with the losses of each sequence, measured on data that the recipe names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.calibration.single.preparation import prepare
from merganser.engine.merge import merge, plan
from merganser.errors import DataError, RecipeError
from tests.calibration.merging import LENGTH, Family, choice, make_family
from tests.reference.btm import posterior_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


def recipe(family: Family, **keys: Any) -> dict[str, Any]:
    found = {"merge_method": "btm", "models": [{"model": str(model)} for model in family.models]}
    return {**found, **keys}


def test_the_models_are_weighted_by_their_losses_on_the_text(llama: Family, tmp_path: Path) -> None:
    data = {"files": str(llama.data[0]), "length": LENGTH}
    # the plan claims no probabilities before they are measured
    assert plan(recipe(llama, data=data)).tensors[0].located == {}
    found = merge(recipe(llama, data=data, keep_statistics=str(tmp_path / "kept")), tmp_path / "out")
    statistics = [merganser.statistics.open_statistics(tmp_path / "kept" / own.name) for own in llama.models]
    # each sequence by itself, in the order of the draw
    with prepare(llama.models[0], [llama.data[0]], choice=choice()) as prepared:
        sequences = [{"input_ids": torch.tensor([sample.stacks[0].ids])} for sample in prepared.samples]
    assert len({s["input_ids"].shape for s in sequences}) > 1
    for own, folder in zip(statistics, llama.models, strict=True):
        model = llama.open(folder).requires_grad_(False)
        expected = [
            float(torch.nn.functional.cross_entropy(model(**s).logits[0, :-1], s["input_ids"][0, 1:], reduction="sum"))
            for s in sequences
        ]
        assert own.losses == pytest.approx(tuple(expected), rel=1e-5)
        assert sum(own.losses) == pytest.approx(own.loss * own.predictions)
    share = posterior_of([own.losses for own in statistics], [1.0, 1.0], 0.3)
    assert 0.001 < share[0] < 0.999
    merged = load_file(tmp_path / "out/model.safetensors")
    models = [load_file(model / "model.safetensors") for model in llama.models]
    for name, tensor in merged.items():
        expected = sum(float(p) * model[name].double() for p, model in zip(share, models, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert found.record["calibrations"][0]["statistics"] == ["count", "loss"]


def test_losses_of_other_texts_and_of_an_earlier_version_are_refused(llama: Family, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for model, data, folder in zip(llama.models, llama.data, folders, strict=True):
        merganser.calibrate(model, [data], folder, statistics=["loss"], length=LENGTH)
    given = recipe(llama)
    for entry, folder in zip(given["models"], folders, strict=True):
        entry["statistics"] = str(folder)
    with pytest.raises(RecipeError, match=r"models\[1\]: its losses are of other sequences than those of .*model0"):
        plan(given)
    file = folders[0] / "loss.safetensors"
    save_file({name: own for name, own in load_file(file).items() if name != "losses"}, file)
    with pytest.raises(DataError, match="has no losses of single sequences; calibrate again with --statistics loss"):
        plan({**given, "models": given["models"][:1]})


def test_without_data_the_posterior_is_given(llama: Family, tmp_path: Path) -> None:
    given = recipe(llama)
    for entry, own in zip(given["models"], (3.0, 1.0), strict=True):
        entry["parameters"] = {"posterior": own}
    merge(given, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    one, two = (load_file(model / "model.safetensors") for model in llama.models)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * two[name])
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["calibrations"] == []
