"""A plan carried out in memory gives what would be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import merganser
from merganser.engine.in_memory import merge_to_state_dict
from merganser.engine.output import staging
from merganser.errors import NonFiniteError
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
    found = merge_to_state_dict(merganser.plan(recipe, **options))
    written = merganser.merge(recipe, tmp_path / "out", **options).out
    assert len(list(written.glob("*.safetensors"))) > 1
    assert_equal(found, read_model(written))


def test_whole_numbers_and_mixed_dtypes(tmp_path: Path) -> None:
    models = []
    for seed in range(2):
        tensors = llama(seed, dtype=torch.bfloat16)
        tensors["steps"] = torch.tensor([3, 5, 7], dtype=torch.uint8)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        models.append(write_model(tmp_path / f"m{seed}", tensors, llama_config()))
    recipe = make_recipe("linear", models, parameters={"weight": 1.0})
    found = merge_to_state_dict(merganser.plan(recipe))
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
