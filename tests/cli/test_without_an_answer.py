"""What has no answer is refused, and nothing is left of it: weights that cancel, and directions of zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.tiny import names, recipe, run, state, write


def refused(folder: Path, document: dict[str, Any]) -> str:
    """Return the message with which a merge is refused; nothing must be left beside the inputs."""
    before = names(folder)
    file = recipe(folder / "r.yaml", document)
    found = run("merge", file, "out")
    assert (found.code, found.out) == (2, "")
    assert found.err.count("error:") == 1
    assert "Traceback" not in found.err
    assert names(folder) == sorted([*before, "r.yaml"])
    return " ".join(found.err.split())


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear", "star", "one_bit", "multislerp"])
def test_weights_that_add_up_to_0_are_refused_where_they_divide(models: Path, method: str) -> None:
    document = {
        "merge_method": method,
        "models": [{"model": name, "parameters": {"weight": w}} for name, w in (("b", 0.4), ("c", -0.4))],
        **({} if method == "linear" else {"base_model": "a"}),
        **({"parameters": {"normalize": True}} if method in ("task_arithmetic", "dare_linear") else {}),
    }
    message = refused(models, document)
    assert "r.yaml" in message
    assert "the weights add up to 0" in message
    assert "got 0.4, -0.4" in message


def test_schedules_that_cancel_in_one_layer_name_it(models: Path) -> None:
    for seed, name in enumerate("ab"):
        write(models / name, state(seed, layers=3), num_hidden_layers=3)
    document = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [1.0, -1.0, 1.0]}},
            {"model": "b", "parameters": {"weight": 1.0}},
        ],
    }
    message = refused(models, document)
    assert "model.layers.1." in message
    assert "add up to 0" in message


def test_what_is_averaged_beside_matrices_is_named(models: Path) -> None:
    document = {
        "merge_method": "iso_c",
        "base_model": "a",
        "models": [{"model": name, "parameters": {"weight": w}} for name, w in (("b", 1.0), ("c", -1.0))],
    }
    message = refused(models, document)
    assert "norm" in message or "embed" in message
    assert "add up to 0" in message
    kept = {**document, "parameters": {"others": "sum"}}
    assert run("merge", recipe(models / "r.yaml", kept), "out").code == 0


def test_a_tensor_of_zeros_has_no_place_on_an_arc(models: Path) -> None:
    empty = state(5)
    name = next(name for name in empty if "norm" in name)
    empty[name] = torch.zeros_like(empty[name])
    write(models / "c", empty)
    document = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "c"}], "parameters": {"t": 0.5}}
    message = refused(models, document)
    assert f"{name}: slerp: the model is all zeros" in message
