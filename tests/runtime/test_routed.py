"""A merge with sidecars as one model: tasks told and chosen, batches, and routers that do not fit."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser import merge, verify
from merganser.errors import CheckpointError, MergeError, NotFoundError, ParameterError
from merganser.inference.language_model import open_model
from merganser.inference.stored import open_stored
from merganser.runtime.routed import RoutedModel
from merganser.runtime.routed.making import make_router
from merganser.runtime.routed.sidecars import ROUTER_FILE
from tests.cli.tiny import run
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


def test_padding_on_the_left_does_not_count_as_positions(tmp_path):
    """GPT-2 has an embedding of each position, so padding must not move the tokens."""
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.evaluation.tiny import add_tokenizer

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=320, bos_token_id=0, eos_token_id=1)
    for name in ("base", "models/a", "models/b"):
        torch.manual_seed(len(name))
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"] * 50
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        add_tokenizer(tmp_path / name)
    ids, mask = torch.tensor([[0, 0, 0, 5, 9], [7, 100, 3, 60, 12]]), torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    reference = f"{tmp_path / 'base'}+{tmp_path / 'models'}"
    model = RoutedModel(reference)
    model.task = "a"
    torch.testing.assert_close(model.logits(ids, mask)[0, 3:], model.logits(ids[:1, 3:])[0])
    model.task = None
    states = model._hidden_states(ids, mask)[0, 3:]
    torch.testing.assert_close(states, model._hidden_states(ids[:1, 3:], mask[:1, 3:])[0])
    likely = RoutedModel(reference, by="perplexity", blend=2)
    assert likely.mixes(ids, mask)[0] == likely.mixes(ids[:1, 3:])[0]


def test_one_row_for_each_row_also_by_a_config(out):
    from transformers import GenerationConfig

    model = RoutedModel(out)
    model.task = "a"
    with pytest.raises(ParameterError, match="one row of tokens for each row"):
        model.generate(IDS, generation_config=GenerationConfig(num_return_sequences=2, num_beams=2))


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
        ({}, "is not a router"),
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


def texts_of(folder):
    words = {"a": "the cat sat on a mat and then it was ", "b": "größere Häuser naïve café 東京 "}
    for name, text in words.items():
        (folder / f"{name}.txt").write_text(text * 20, encoding="utf-8")
    return [f"{name}={folder / name}.txt" for name in words]


def test_command_makes_a_router_that_is_ours(out, tmp_path):
    given = texts_of(tmp_path)
    found = run("route", out, "--data", *given, "--length", 16)
    assert found.code == 0, found
    assert f"wrote {out / ROUTER_FILE}" in found.out
    assert found.out.count("100.0 %") == 2
    assert verify(out).ok
    (out / ROUTER_FILE).write_bytes(b"damaged")
    assert not verify(out).ok
    again = run("route", out, "--data", *given, "--length", 16, "--json")
    assert again.code == 0, again
    assert verify(out).ok
    assert RoutedModel(out).router is not None
    assert [path.name for path in (out / "sidecars").iterdir() if path.name.startswith(".")] == []


def test_overwrite_accepts_the_router(out, tmp_path):
    make_router(out, {each.partition("=")[0]: [each.partition("=")[2]] for each in texts_of(tmp_path)}, length=16)
    root = out.parent
    models = [{"model": str(root / name), "name": name} for name in "ab"]
    merge({"merge_method": "emr", "base_model": str(root / "base"), "models": models}, out, overwrite=True)
    assert not (out / ROUTER_FILE).exists()


def test_a_file_of_the_user_is_not_replaced(out, tmp_path):
    (out / ROUTER_FILE).write_text("notes")
    found = run("route", out, "--data", *texts_of(tmp_path), "--length", 16)
    assert (found.code, (out / ROUTER_FILE).read_text()) == (2, "notes")
    assert "merganser did not write it" in found.err
    (out / ROUTER_FILE).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given[:1], "'b' has none"),
        (lambda given: [*given, given[0].replace("a=", "c=", 1)], "no task 'c'"),
        (lambda given: [*given, "b"], "must be TASK=FILE"),
        (lambda given: [given[0], "b=missing.txt"], "no such file"),
        (lambda given: [*given, "--length", 65], "at most 64"),
        (lambda given: [*given, "--windows", 2, "--length", 64], None),
    ],
)
def test_bad_data_of_routers(out, tmp_path, change, message):
    found = run("route", out, "--data", *change(texts_of(tmp_path)))
    if message is None:
        assert found.code == 0, found
    else:
        assert (found.code, message in found.err) == (2, True), found
