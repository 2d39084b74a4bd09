"""Merges that are handed statistics of gradients: of every tensor, of the base, and in the measuring passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merganser
from merganser.checkpoint import Reader
from merganser.errors import DataError, RecipeError
from merganser.statistics import open_statistics
from tests.engine.downhill import downhill
from tests.engine.test_from_data import _experts
from tests.making import register
from tests.reference.fisher import fisher
from tests.reference.led import led
from tests.reference.mats import mats
from tests.reference.sens import sens
from tests.shared import copied

MADE: dict[str, Any] = {"length": 40, "sequences": 3}


# what the tests below take of each family, measured together: each is the same as alone
STATISTICS = {
    "llama": ("gram gradient_gram absolute_gradient", "absolute_gradient"),
    "llama-tied": ("fisher sensitivity", "gradient"),
    "gpt2": ("fisher gram gradient_gram", ""),
    "mixtral": ("fisher", ""),
}


def _calibrated(folder: Path, family: str, statistics: tuple[str, str] | None = None) -> None:
    """Write a base and two experts with statistics of gradients, of the base, too, on the data of each expert."""
    own, base = statistics or STATISTICS[family]

    def write(made: Path) -> None:
        _experts(made, family, statistics=False)
        for i in (1, 2):
            data = [made / f"data{i}.jsonl"]
            if own:
                merganser.calibrate(made / f"expert{i}", data, made / f"own{i}", statistics=own.split(), **MADE)
            if base:
                merganser.calibrate(made / "base", data, made / f"base{i}", statistics=base.split(), **MADE)

    copied(folder, f"gradients {family} {own} {base}", write)


def _recipe(folder: Path, method: str, *, own: bool = True, base: bool = False, **keys: Any) -> dict[str, Any]:
    models = [
        {
            "model": str(folder / f"expert{i}"),
            **({"statistics": str(folder / f"own{i}")} if own else {}),
            **({"base_statistics": str(folder / f"base{i}")} if base else {}),
        }
        for i in (1, 2)
    ]
    return {"merge_method": method, "models": models, **keys}


def _means(folder: Path, statistic: str, kind: str = "own") -> list[dict[str, Tensor]]:
    found = []
    for i in (1, 2):
        own = open_statistics(folder / f"{kind}{i}")
        with Reader() as reader:
            found.append(
                {
                    name: own.read(reader, statistic, name).double() / own.predictions
                    for name, given in own.gradients.items()
                    if statistic in given
                }
            )
    return found


def _weights(folder: Path, *names: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / name / "model.safetensors") for name in names]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_fisher_weights_every_tensor(family: str, tmp_path: Path) -> None:
    _calibrated(tmp_path, family)
    merganser.merge(_recipe(tmp_path, "fisher"), tmp_path / "out", threads=2)
    (merged,) = _weights(tmp_path, "out")
    models, data = _weights(tmp_path, "expert1", "expert2"), _means(tmp_path, "fisher")
    assert data[0].keys() == models[0].keys() == merged.keys()
    names = sorted(models[0])
    # the numbers that are divided by are those of the whole model, so check them there, and entries in a few tensors
    sizes = [
        (sum(float(t.square().sum()) for t in own.values()) / sum(t.numel() for t in own.values())) ** 0.5
        for own in data
    ]
    for name in (*names[:6], *names[-4:]):
        scaled = [[own[name] / size] for own, size in zip(data, sizes, strict=True)]
        amount = [part[0].clamp(min=1e-6) for part in scaled]
        expected = sum(a * m[name].double() for a, m in zip(amount, models, strict=True)) / sum(amount)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_whole_models_against_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, downhill=downhill)
    _calibrated(tmp_path, "llama-tied")
    recipe = _recipe(tmp_path, "fisher")
    recipe["models"][1]["parameters"] = {"weight": 0.5}
    merganser.merge(recipe, tmp_path / "a")
    downwards = _recipe(tmp_path, "downhill", own=False, base=True, base_model=str(tmp_path / "base"))
    merganser.merge(downwards, tmp_path / "b", threads=2)
    base, one, two, a, b = _weights(tmp_path, "base", "expert1", "expert2", "a", "b")
    names = sorted(base)
    models = [[own[name] for name in names] for own in (one, two)]
    fishers = [[own[name] for name in names] for own in _means(tmp_path, "fisher")]
    for name, expected in zip(names, fisher(models, fishers, weight=[1.0, 0.5]), strict=True):
        torch.testing.assert_close(a[name].double(), expected, rtol=1e-4, atol=1e-6)
    gradients = _means(tmp_path, "gradient", "base")
    for name in names:
        vectors = [own[name].double() - base[name].double() for own in (one, two)]
        kept = [v * (v * own[name] < 0) for v, own in zip(vectors, gradients, strict=True)]
        torch.testing.assert_close(b[name].double(), base[name].double() + sum(kept), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(b[name], base[name]) for name in names)


# GPT-2 stores its matrices [inputs, outputs]
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_matrices_get_both_grams(family: str, tmp_path: Path) -> None:
    _calibrated(tmp_path, family)
    merganser.merge(_recipe(tmp_path, "mats", base_model=str(tmp_path / "base")), tmp_path / "out")
    base, one, two, merged = _weights(tmp_path, "base", "expert1", "expert2", "out")
    own = [open_statistics(tmp_path / f"own{i}") for i in (1, 2)]
    outputs = _means(tmp_path, "gradient_gram")
    name = {"llama": "model.layers.1.self_attn.k_proj.weight", "gpt2": "transformer.h.1.attn.c_proj.weight"}[family]
    with Reader() as reader:
        inputs = [each.read(reader, "gram", name).double() / each.read(reader, "count", name) for each in own]
    turn = (lambda tensor: tensor.T) if family == "gpt2" else (lambda tensor: tensor)
    expected = mats(turn(base[name]), [turn(one[name]), turn(two[name])], inputs, [each[name] for each in outputs])
    torch.testing.assert_close(turn(merged[name]).double(), expected, rtol=1e-3, atol=1e-5)
    average = (one[name] + two[name]) / 2
    assert (merged[name] - average).norm() > 0.1 * (average - base[name]).norm()


def test_gradients_of_the_base_are_told_apart(tmp_path: Path) -> None:
    _calibrated(tmp_path, "llama")
    recipe = _recipe(tmp_path, "led", base=True, base_model=str(tmp_path / "base"))
    merganser.merge(recipe, tmp_path / "out")
    base, one, two, merged = _weights(tmp_path, "base", "expert1", "expert2", "out")
    own, before = _means(tmp_path, "absolute_gradient"), _means(tmp_path, "absolute_gradient", "base")
    for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        given = [[each[name] for each in kind] for kind in (own, before)]
        expected = led(base[name], [one[name], two[name]], *given)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, downhill=downhill)
    _calibrated(tmp_path, "llama", ("fisher", ""))

    def check(kind: type[Exception], message: str, recipe: dict[str, Any]) -> None:
        with pytest.raises(kind, match=message):
            merganser.merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    base = str(tmp_path / "base")
    check(
        RecipeError,
        r"downhill needs statistics of the base on this model's data \(gradient\); write them with merganser calibrate "
        rf"{base} --data FILE --statistics gradient --out FOLDER, and give the folder as 'base_statistics'",
        _recipe(tmp_path, "downhill", own=False, base_model=base),
    )
    check(
        RecipeError,
        "base_statistics: fisher uses no statistics of the base on this model's data; leave the key out",
        {**_recipe(tmp_path, "fisher", base=True)},
    )
    check(DataError, "has no 'gradient'; it has count, fisher, loss", _recipe(tmp_path, "rcp", base_model=base))


def test_numbers_are_known_when_a_merge_is_planned(tmp_path: Path) -> None:
    _calibrated(tmp_path, "llama-tied")
    recipe = _recipe(tmp_path, "sens", base_model=str(tmp_path / "base"), parameters={"temperature": 0.02})
    merganser.merge(recipe, tmp_path / "a")
    base, one, two, a = _weights(tmp_path, "base", "expert1", "expert2", "a")
    names = sorted(base)
    layers = [int(name.split(".")[2]) if ".layers." in name else None for name in names]
    own = [open_statistics(tmp_path / f"own{i}") for i in (1, 2)]
    measured = [[each.sensitivity(name) for name in names] for each in own]
    models = [[each[name] for name in names] for each in (one, two)]
    expected = sens([base[name] for name in names], models, layers, measured, temperature=0.02)
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(a[name].double(), tensor, rtol=1e-5, atol=1e-6)
    recipe = _recipe(tmp_path, "lm_cocktail", parameters={"temperature": 0.1})
    merganser.merge(recipe, tmp_path / "b")
    (b,) = _weights(tmp_path, "b")
    share = torch.softmax(torch.tensor([-each.loss / 0.1 for each in own], dtype=torch.float64), 0)
    assert share.max() - share.min() > 0.01
    for name in names:
        mixed = share[0] * one[name] + share[1] * two[name]
        torch.testing.assert_close(b[name].double(), mixed.double(), rtol=1e-5, atol=1e-6)
    del recipe["models"][1]["statistics"]
    with pytest.raises(RecipeError, match=r"lm_cocktail needs statistics of this model from data \(loss\)"):
        merganser.merge(recipe, tmp_path / "c")
