"""Aligned models on the command line: what the plan and the merge say, and the exit code of a bad recipe."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny import linear, recipe, run


def test_what_moves_is_said_before_and_after(models: Path) -> None:
    file = models / "b" / "model.safetensors"
    tensors = load_file(models / "a" / "model.safetensors")
    name = "model.layers.0.mlp.{}_proj.weight"
    swapped = torch.arange(tensors[name.format("up")].shape[0])
    swapped[[0, 1]] = swapped[[1, 0]]
    up, down = name.format("up"), name.format("down")
    moved = {up: tensors[up][swapped], down: tensors[down][:, swapped].contiguous()}
    save_file(tensors | moved, file, {"format": "pt"})
    path = recipe(models / "r.yaml", linear("a", "b", align={"units": "mlp"}))
    line = f"b  2 of {2 * len(swapped)} hidden units move"
    planned = run("plan", path)
    assert planned.code == 0, planned.err
    assert "aligns models to a\n" in planned.out
    assert line in planned.out
    merged = run("merge", path, "out")
    assert merged.code == 0, merged.err
    assert "aligned models to a\n" in merged.out
    assert line in merged.out


def test_a_bad_recipe_exits_with_2(models: Path) -> None:
    found = run("merge", recipe(models / "r.yaml", linear("a", "b", align={"unit": "mlp"})), "out")
    assert found.code == 2
    assert "align: unknown key 'unit'. Did you mean 'units'?" in found.err
    assert not list(models.glob("*out*"))
