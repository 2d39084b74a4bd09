"""Statistics from data of models that store the same in other ways: other numbers of tokens, other names, no head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.engine.merge import merge, plan
from tests.calibration.merging import LENGTH, Family, make_family

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# of inputs within the merge, by Adam, by a teacher, of all models together, and entry by entry
METHODS = ["regmean_plus", "featcal", "expert_merging", "adamerging", "dam", "pleas", "fisher", "led"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


def renumbered(model: Path, folder: Path, more: int = 0, *, moving: bool = True) -> Path:
    """Write the same model with other numbers for its tokens, and rows of no token at the end."""
    shutil.copytree(model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {own["id"] for own in tokenizer.get("added_tokens", [])}
    movable = [number for number in sorted(vocabulary.values()) if moving and number not in special]
    order = torch.randperm(len(movable), generator=torch.Generator().manual_seed(3)).tolist()
    moved = dict(zip(movable, (movable[i] for i in order), strict=True))
    tokenizer["model"]["vocab"] = {token: moved.get(number, number) for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(folder / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        rows = torch.cat([tensors[name], torch.ones(more, tensors[name].shape[1])])
        for before, after in moved.items():
            rows[after] = tensors[name][before]
        tensors[name] = rows
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + more}))
    return folder


def written(family: Family, method: str, second: Path, **keys: Any) -> dict[str, Any]:
    """A recipe of the first model and another one, on the data of the first."""
    recipe = family.recipe(method)
    recipe["models"][1] = {"model": str(second)}
    if method in ("expert_merging", "adamerging", "dam"):
        recipe["parameters"] = {"steps": 2}
    return {**recipe, "dtype": "float32", "data": {"files": str(family.data[0]), "length": LENGTH}, **keys}


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_tokens_do_not_matter(method: str, family: Family, tmp_path: Path) -> None:
    other = renumbered(family.models[1], tmp_path / "other")
    merge(written(family, method, family.models[1]), tmp_path / "as-it-is")
    recipe = written(family, method, other, tokenizer_source="base")
    planned = plan(recipe)
    merge(recipe, tmp_path / "matched")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("as-it-is", "matched"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    assert len({each.tokens for each in planned.calibrations}) == 1


@pytest.mark.parametrize("method", ["fisher", "adamerging"])
def test_rows_of_no_token_are_left_out(method: str, family: Family, tmp_path: Path) -> None:
    for moving in (False, True):
        other = renumbered(family.models[1], tmp_path / f"model-{moving}", 5, moving=moving)
        merge(written(family, method, other, tokenizer_source="base"), tmp_path / f"merged-{moving}")
    expected, found = (load_file(tmp_path / f"merged-{moving}/model.safetensors") for moving in (False, True))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_kept_statistics_are_taken_again_and_planned(family: Family, tmp_path: Path) -> None:
    other = renumbered(family.models[1], tmp_path / "other")
    recipe = written(family, "regmean_plus", other, tokenizer_source="base", keep_statistics=str(tmp_path / "kept"))
    merge(recipe, tmp_path / "one")
    assert [each.present for each in plan(recipe).calibrations] == [True, True]
    merge(recipe, tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_tied_model_teaches_a_merge_with_a_head(family: Family, tmp_path: Path) -> None:
    """The embedding of a tied model stands for its head: as if it were stored twice."""
    tied, twice = tmp_path / "tied", tmp_path / "twice"
    for folder in (tied, twice):
        shutil.copytree(family.models[1], folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if folder == tied:
            del tensors[HEAD]
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for method in ("dam", "expert_merging_whole"):
        merges = []
        for second in (twice, tied):
            recipe = written(family, method, second) | {"parameters": {"steps": 2}}
            merge(recipe, tmp_path / f"{method}-{second.name}")
            merges.append(load_file(tmp_path / f"{method}-{second.name}" / "model.safetensors"))
        for name, tensor in merges[0].items():
            torch.testing.assert_close(merges[1][name], tensor, msg=name)


@pytest.mark.parametrize("method", ["regmean", "fisher", "sens", "adamerging"])
def test_names_of_tensors_do_not_matter(method: str, tmp_path: Path) -> None:
    """Models of GPT-2 are stored with and without a prefix; statistics know the name that the model itself has."""
    family = make_family(tmp_path, "gpt2")
    short = tmp_path / "short"
    shutil.copytree(family.models[1], short)
    tensors = load_file(short / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    without = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(without, short / "model.safetensors", {"format": "pt"})
    for second in (family.models[1], short):
        merge(written(family, method, second), tmp_path / f"with-{second.name}")
    long, found = (tmp_path / f"with-{second.name}/model.safetensors" for second in (family.models[1], short))
    assert found.read_bytes() == long.read_bytes()
