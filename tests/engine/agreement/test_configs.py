"""Models whose tensors have equal shapes, and whose configs make other functions of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError
from tests.making import HIDDEN, llama, llama_config, make_recipe, write_model


def models(root: Path, **settings: Any) -> list[Path]:
    """Two Llamas, the second with other settings."""
    configs = llama_config(), {**llama_config(), **settings}
    return [write_model(root / f"m{i}", llama(i), config) for i, config in enumerate(configs)]


def slices(paths: list[Path]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": str(path), "layer_range": [0, 2]}]} for path in paths]


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads is 4, not 2"),
        ({"hidden_act": "relu"}, "hidden_act is relu, not silu"),
        ({"model_type": "gemma"}, "model_type is gemma, not llama"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, settings: dict, said: str, sliced: bool) -> None:
    paths = models(tmp_path, **settings)
    recipe = make_recipe("linear", paths, parameters={"weight": 0.5})
    if sliced:
        recipe = {"merge_method": "passthrough", "slices": slices(paths)}
    with pytest.raises(CheckpointError) as caught:
        merge(recipe, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(
        f"{paths[1]}: config.json interprets the same tensors differently from that of {paths[0]}:"
    )
    assert said in message
    assert "correct it" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shared", [{}, {"num_hidden_layers": 12, "num_hidden_groups": 2}])
def test_layers_that_share_weights_are_counted_once(tmp_path: Path, shared: dict) -> None:
    paths = [write_model(tmp_path / f"m{i}", llama(i), llama_config() | shared) for i in range(2)]
    assert plan(make_recipe("linear", paths, parameters={"weight": 0.5})).warnings == []


def test_what_may_differ_is_said(tmp_path: Path) -> None:
    paths = models(tmp_path, rope_theta=500000.0, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    result = merge(make_recipe("linear", paths, parameters={"weight": 0.5}), tmp_path / "out")
    [warning] = result.record["warnings"]
    assert warning.startswith(
        f"{paths[1]}: config.json differs from that of {paths[0]}, whose settings the output gets"
    )
    assert "rope_theta is 500000.0, not 10000.0" in warning
    assert 'rope_scaling is {"factor": 4.0, "rope_type": "yarn"}, not not set' not in warning
    assert 'rope_scaling is {"factor": 4.0, "rope_type": "yarn"}, where it is not set' in warning
    assert "rope_theta" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_settings_of_unknown_effect_are_said(tmp_path: Path) -> None:
    paths = models(tmp_path, own_trick=["x" * 100])
    [warning] = plan(make_recipe("linear", paths, parameters={"weight": 0.5})).warnings
    assert "was not checked: own_trick is" in warning
    assert len(warning) < 600


def test_equal_configs_and_models_without_any_go_on(tmp_path: Path) -> None:
    paths = models(tmp_path, torch_dtype="float32", transformers_version="5.0.0")
    assert plan(make_recipe("linear", paths, parameters={"weight": 0.5})).warnings == []
    (tmp_path / "m1" / "config.json").unlink()
    assert plan(make_recipe("linear", paths, parameters={"weight": 0.5})).warnings == []


def test_a_head_of_its_own_beside_one_that_is_the_embedding(tmp_path: Path) -> None:
    paths = [
        write_model(tmp_path / f"m{i}", llama(i, head=not tied), llama_config(tied=tied))
        for i, tied in enumerate([False, True])
    ]
    [warning] = plan(make_recipe("linear", paths, parameters={"weight": 0.5})).warnings
    assert warning.startswith(f"lm_head.weight: {paths[1]} shares it with the embedding, and other models do not")
    # the other way round it is said as well
    assert len(plan(make_recipe("linear", paths[::-1], parameters={"weight": 0.5})).warnings) == 1


@pytest.mark.parametrize("head", [False, True])
def test_labels_in_another_order(tmp_path: Path, head: bool) -> None:
    paths = []
    for i, labels in enumerate([["spam", "ham"], ["HAM", "SPAM"]]):
        tensors = llama(i, head=False)
        if head:
            tensors["score.weight"] = torch.ones(2, HIDDEN)
        architecture = "LlamaForSequenceClassification" if head else "LlamaForCausalLM"
        config = {**llama_config(tied=True), "architectures": [architecture], "id2label": dict(enumerate(labels))}
        paths.append(write_model(tmp_path / f"m{i}", tensors, config))
    recipe = make_recipe("linear", paths, parameters={"weight": 0.5})
    if head:
        with pytest.raises(CheckpointError, match="id2label is"):
            plan(recipe)
    else:
        assert any("id2label is" in warning for warning in plan(recipe).warnings)
