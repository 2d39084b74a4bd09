"""A merge with sidecars as one model: tasks told and chosen, batches, and routers that do not fit."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser import merge
from merganser.errors import CheckpointError, MergeError, NotFoundError, ParameterError
from merganser.inference.language_model import open_model
from merganser.inference.stored import open_stored
from merganser.runtime.routed import ROUTER_FILE, RoutedModel
from tests.evaluation.tiny import make_model

IDS = torch.tensor([[5, 9, 30, 41], [7, 100, 3, 60]])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    root = tmp_path_factory.mktemp("routed")
    make_model(root / "base", 0)
    for seed, name in enumerate("ab", 1):
        make_model(root / name, seed, like=root / "base")
    models = [{"model": str(root / name), "name": name} for name in "ab"]
    merge({"merge_method": "emr", "base_model": str(root / "base"), "models": models}, root / "out")
    return root / "out"


def expected(out, task, ids):
    opened = open_model(open_stored(f"{out}#{task}"))
    with torch.inference_mode():
        return opened.load(opened.source.read(), torch.float32, torch.device("cpu"))(input_ids=ids).logits


def test_tasks_told_chosen_and_mixed(out):
    model = RoutedModel(out)
    with pytest.raises(NotFoundError, match="has no router; make one from text"):
        model.choose(IDS)
    with pytest.raises(ParameterError, match="no task 'c'"):
        model.task = "c"
    model.task = "b"
    assert model.logits(IDS).equal(expected(out, "b", IDS))
    model.task = None
    texts = {"a": ["the cat sat on a mat"], "b": ["größere Häuser naïve café"]}
    model.fit(texts)
    model.save_router()
    again = RoutedModel(out)
    ids = torch.stack([torch.tensor(again.tokenizer(texts[t][0])["input_ids"][:5]) for t in "ba"])
    assert again.choose(ids) == ["b", "a"]
    found = again.logits(ids)
    assert torch.allclose(found[:1], expected(out, "b", ids[:1]), atol=1e-5)
    assert torch.allclose(found[1:], expected(out, "a", ids[1:]), atol=1e-5)
    assert again.generate(ids, max_new_tokens=2, do_sample=False).shape[0] == 2


def test_snippet_of_the_page(out):
    page = (Path(__file__).parents[2] / "docs/sidecars.md").read_text(encoding="utf-8")
    snippet = re.search(r"^```python with-tokenizer\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    for name, here in {"merged": out.as_posix(), "math": "a", "python": "b"}.items():
        snippet = snippet.replace(f'"{name}"', f'"{here}"')
    names = {"math_texts": ["the cat sat"], "python_texts": ["def return x = 1 ;"]}
    exec(snippet, names)
    assert len(names["tokens"]) == 2
    assert names["tokens"].shape[1] > names["prompts"]["input_ids"].shape[1]
    assert (out / ROUTER_FILE).exists()


def test_a_task_without_text(out):
    with pytest.raises(ParameterError, match="that of 'b' is empty"):
        RoutedModel(out).fit({"a": ["the cat"]})


@pytest.mark.parametrize("damage", [b"", b"not a router"])
def test_damaged_router(out, damage):
    (out / ROUTER_FILE).write_bytes(damage)
    with pytest.raises(CheckpointError, match="is damaged, or no router"):
        RoutedModel(out)
    (out / ROUTER_FILE).unlink()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "is no router"),
        ({"format": "9"}, "later version"),
        ({"format": "1", "tasks": '["a"]'}, "is for the tasks"),
        ({"format": "1", "tasks": '["a", "b"]', "shared": "x"}, "another shared model"),
    ],
)
def test_foreign_router(out, metadata, message):
    save_file({"rows": torch.zeros(2, 32)}, out / ROUTER_FILE, metadata)
    with pytest.raises(MergeError, match=message):
        RoutedModel(out)
    (out / ROUTER_FILE).unlink()
