"""Each part of a model restored in its own way: masks for a language model, own or shared layers of an action head."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merganser
from merganser import merge, restore, verify
from merganser.engine.merge import plan
from merganser.errors import RecipeError
from tests.making import Tensors, read_json, read_model

TASKS = ["spatial", "object", "goal"]
HEAD = "action_head.layers."


def parts(seed: int, *, head: bool = True) -> Tensors:
    """A vision tower, a language model, and an action head with queries of its own."""
    draw = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    tensors = {"language_model.model.embed_tokens.weight": made(12, 8), "language_model.model.norm.weight": made(8)}
    for layer in range(2):
        tensors[f"vision_tower.encoder.layers.{layer}.mlp.fc1.weight"] = made(8, 6)
        tensors[f"language_model.model.layers.{layer}.self_attn.q_proj.weight"] = made(8, 8)
        tensors[f"language_model.model.layers.{layer}.mlp.up_proj.weight"] = made(16, 8)
    tensors["multi_modal_projector.linear.weight"] = made(8, 6)
    if head:
        for layer in range(3):
            tensors[f"{HEAD}{layer}.cross_attn.weight"] = made(8, 8)
        tensors["action_head.out.weight"] = made(7, 8)
        tensors["action_queries.weight"] = made(4, 8)
    return tensors


def write(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "tiny_vla", "architectures": ["TinyVLA"], "text_config": {"num_hidden_layers": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model without an action head, and three models with one that were trained from it."""
    folder = tmp_path_factory.mktemp("vla") / "models"
    base = parts(0, head=False)
    write(folder / "vision-language", base)
    for seed, task in enumerate(TASKS, 1):
        own = parts(seed)
        tuned = {name: base[name] + 0.01 * own[name] if name in base else own[name] for name in own}
        write(folder / task, tuned)
    return folder


def recipe_of_the_page(root: Path, name: str) -> Path:
    """Write a recipe of docs/sidecars.md, with the models of this test."""
    page = (Path(__file__).parents[3] / "docs/sidecars.md").read_text(encoding="utf-8")
    [text] = re.findall(rf"^```yaml\n(# {name}\.yaml.*?)^```$", page, re.MULTILINE | re.DOTALL)
    file = root / f"{name}.yaml"
    file.write_text(text.replace("models/", f"{root.as_posix()}/"))
    return file


def test_the_page_merges_models_with_an_action_head(root: Path, tmp_path: Path) -> None:
    """MergeVLA: masks for what was trained before, the mean of the head's first layers, the last layer of each task."""
    merge(recipe_of_the_page(root, "start"), root / "start")
    out = merge(recipe_of_the_page(root, "vla"), tmp_path / "out").out
    assert verify(out).ok
    base = read_model(root / "vision-language")
    models = {task: read_model(root / task) for task in TASKS}
    merged = read_model(out)
    assert merged.keys() == models["goal"].keys()
    for task in TASKS:
        restored = read_model(restore(out, task, tmp_path / task).out)
        for name, tensor in restored.items():
            if name.startswith((f"{HEAD}2.", "action_head.out")):
                wanted = models[task][name]
            elif name.startswith("action_"):
                wanted = sum(model[name] for model in models.values()) / 3
                torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)
            else:
                deltas = {each: model[name] - base[name] for each, model in models.items()}
                total = sum(deltas.values())
                others = total - deltas[task]
                wanted = base[name] + torch.where(deltas[task].abs() > 0.6 * others.abs(), total, 0.0)
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    kept = {name: entry.get("kept") for name, entry in read_json(out, "sidecars/index.json")["tensors"].items()}
    assert kept[f"{HEAD}2.cross_attn.weight"] == "own"
    assert kept[f"{HEAD}0.cross_attn.weight"] == "merged"
    assert kept["vision_tower.encoder.layers.0.mlp.fc1.weight"] is None


def test_the_page_chooses_a_task_from_an_observation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An observation that lies in what the shared head reads under one task's mask, and across it under the others'."""
    if not (root / "start").exists():
        merge(recipe_of_the_page(root, "start"), root / "start")
    merged = merge(recipe_of_the_page(root, "vla"), tmp_path / "merged").out
    page = (Path(__file__).parents[3] / "docs/sidecars.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"^```python with-states\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    name = f"{HEAD}1.cross_attn.weight"
    _, _, right = torch.linalg.svd(read_model(merged)[name].double())
    asked = []

    def observed(task: str, part: str) -> torch.Tensor:
        asked.append((task, part))
        return right[0 if task == "goal" else 7].float().expand(1, 3, 8)

    monkeypatch.chdir(tmp_path)
    names = {"merganser": merganser, "observed": observed}
    exec(snippet.replace("rank=8", "rank=4"), names)
    assert names["task"] == "goal"
    assert asked == [(task, name) for task in TASKS]
    wanted = read_model(restore(merged, "goal", tmp_path / "again").out)
    assert {name: tensor.tolist() for name, tensor in read_model(tmp_path / "merged-goal").items()} == {
        name: tensor.tolist() for name, tensor in wanted.items()
    }


@pytest.mark.parametrize("method", ["emr", "twin", "one_bit", "rmm", "skillpack"])
def test_every_method_with_sidecars_keeps_what_the_recipe_says(root: Path, tmp_path: Path, method: str) -> None:
    keep = [
        {"filter": "action_head", "value": "own"},
        {"filter": "vision_tower", "value": "merged"},
        {"value": "parts"},
    ]
    base = {"merge_method": method, "base_model": str(root / "spatial"), "parameters": {"keep": keep}}
    out = merge({**base, "models": [{"model": str(root / task)} for task in TASKS[1:]]}, tmp_path / "out").out
    merged, model = read_model(out), read_model(root / "goal")
    restored = read_model(restore(out, "goal", tmp_path / "goal").out)
    for name, tensor in restored.items():
        if name.startswith("action_head"):
            assert torch.equal(tensor, model[name])
        elif name.startswith("vision_tower"):
            assert torch.equal(tensor, merged[name])
    assert any(not torch.equal(restored[name], merged[name]) for name in restored if name.startswith("language_model"))


def test_a_way_that_there_is_not(root: Path) -> None:
    recipe = {"merge_method": "emr", "base_model": str(root / "spatial"), "models": [{"model": str(root / "goal")}]}
    with pytest.raises(RecipeError, match=r"keep must be one of parts, own, merged, got 'mine'"):
        plan({**recipe, "parameters": {"keep": "mine"}})
