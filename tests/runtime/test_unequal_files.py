"""Experts of unequal sizes: the command, what is stored, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merganser.errors import (
    CheckpointError,
    MergeError,
    NotFoundError,
    ParameterError,
    UnsupportedError,
)
from merganser.evaluation import evaluate
from merganser.runtime.routed import open_tasks
from merganser.runtime.routed.gated.stored import GATES_FILE
from merganser.runtime.routed.unequal import MixtureSettings, UnequalModel
from merganser.runtime.routed.unequal.experts import open_experts
from tests.cli.tiny import run
from tests.evaluation.tiny import add_tokenizer
from tests.runtime.unequal import IDS, LISTS, TEXTS, loaded, made, make_experts, opened


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experts, and a text for each."""
    return make_experts(tmp_path_factory.mktemp("unequal"))


def test_command(root: Path) -> None:
    out = root / "experts"
    given = [f"{name}={root / name}.txt" for name in "abc"]
    plain = run("route", out, "--data", *given, "--length", 16)
    assert plain.code == 2
    assert f"models of unequal sizes need none: merganser route {out} --gates mergeme" in plain.err
    found = run("route", out, "--data", *given, "--length", 16, "--gates", "mergeme", "--top", 2)
    assert found.code == 0, found.err
    assert "mixture of 3 experts" in found.out
    assert "parameters: a " in found.out
    assert "by router, own embeddings, 2 experts per text" in found.out
    assert re.search(r"text of +made from +right +mixture +alone a +alone b +alone c +share of a", found.out)
    assert re.search(r"^ *b +\d+ +100.0 %", found.out, re.MULTILINE), found.out
    assert f"wrote {out / GATES_FILE}" in found.out
    measured = run(
        "eval", f"{out}#gates", "--tasks", root / "b.txt", "--limit", 2, "--context", 16, "--dtype", "float32"
    )
    assert measured.code == 0, measured.err
    assert (
        "choices of experts#gates: windows or questions by the task that has the largest share of them" in measured.out
    )
    assert re.search(r"^ *b +100.0 % +2", measured.out, re.MULTILINE), measured.out
    options = ["--by", "perplexity", "--embeddings", "shared", "--steps", 2, "--json"]
    again = run("route", out, "--data", *given, "--length", 16, "--gates", "mergeme", *options)
    assert again.code == 0, again.err
    report = again.json
    assert len(report["trained"]) == 2
    assert report["settings"] == {"by": "perplexity", "embeddings": "shared", "top": 1}
    assert report["loss"]["a"].keys() == {"mixture", "projected", "alone a", "alone b", "alone c"}
    assert UnequalModel(out).settings.shared
    (out / GATES_FILE).unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gates", "mergme"], "gates: no kind 'mergme'. Did you mean 'mergeme'"),
        (["--gates", "mergeme", "--rank", 4], "--rank: is for parts of one model, and mergeme mixes whole models"),
        (["--gates", "mergeme", "--density", 0.5], "--density: is for parts of one model"),
        (["--gates", "mergeme", "--top", 4], "top: 4 experts are to have a weight, and there are 3"),
        (["--gates", "mergeme", "--by", "gate"], "by: must be 'router' or 'perplexity', found 'gate'"),
        (["--gates", "mergeme", "--embeddings", "none"], "embeddings: must be 'own' or 'shared', found 'none'"),
        (
            ["--gates", "mergeme", "--steps", 1, "--objective", "entropy"],
            "is trained on the loss of the next token alone",
        ),
        (["--gates", "mergeme", "--steps", 1, "--by", "perplexity"], "have nothing that could be trained"),
        (["--gates", "mergeme", "--length", 60], "length: 60 tokens, and the model can see 48 at once"),
        (["--gates", "wemoe", "--top", 2], "--top: is for --gates mergeme"),
        (["--by", "perplexity"], "--by: is for --gates mergeme"),
        (["--embeddings", "own"], "--embeddings: is for --gates mergeme"),
    ],
)
def test_bad_options(root: Path, options: list[Any], message: str) -> None:
    given = [f"{name}={root / name}.txt" for name in "abc"]
    if "--length" not in options:
        options = [*options, "--length", 16]
    found = run("route", root / "experts", "--data", *given, *options)
    assert found.code == 2, found.out
    assert message in found.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown", r"no task 'd'\. Tasks: a, b, c"),
        ("untold", "the router needs text of every task; 'c' has none"),
    ],
)
def test_bad_data(root: Path, change: str, message: str) -> None:
    names = "abcd" if change == "unknown" else "ab"
    given = [f"{name}={root / 'a.txt'}" for name in names]
    found = run("route", root / "experts", "--data", *given, "--gates", "mergeme")
    assert found.code == 2
    assert re.search(message, found.err), found.err


def test_bad_settings_and_calls(root: Path) -> None:
    with pytest.raises(ParameterError, match="top: must be a whole number of at least 1, found 0"):
        MixtureSettings(top=0)
    with pytest.raises(ParameterError, match="top: must be a whole number of at least 1, found True"):
        MixtureSettings(top=True)
    model = made(root / "experts")
    with pytest.raises(ParameterError, match="c: can see 48 tokens at once, and a text has 49"):
        opened(root / "experts", "perplexity").logits(torch.full((1, 49), 5))
    with pytest.raises(ParameterError, match="c: can see 48 tokens at once, and a text has 49"):
        model.generate(IDS, max_new_tokens=44)
    for name in ("past_key_values", "cache_implementation", "assistant_model", "output_attentions"):
        with pytest.raises(ParameterError, match=f"generate of a mixture takes no {name}"):
            model.generate(IDS, **{name: "x"})
    with pytest.raises(ParameterError, match=r"prompts are needed \(input_ids\)"):
        model.model.generate()
    with pytest.raises(ParameterError, match="no expert 'd'"):
        model.fit({"d": ["the cat"]})
    with pytest.raises(ParameterError, match="that for 'b' is empty"):
        model.fit({"a": ["the cat sat on a mat"]})
    with pytest.raises(ParameterError, match="ridge must be a positive number, found 0"):
        model.fit(LISTS, ridge=0.0)
    with pytest.raises(NotFoundError, match="has no router"):
        UnequalModel(root / "experts", MixtureSettings()).save()
    with pytest.raises(
        NotFoundError, match=r"no such mixture; make it from text: merganser route FOLDER --gates mergeme"
    ):
        UnequalModel(root / "experts")


def test_a_model_that_scales_its_logits_cannot_share_its_head(root: Path, tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CohereConfig(vocab_size=300, **sizes, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    CohereForCausalLM(config).save_pretrained(tmp_path / "d")
    add_tokenizer(tmp_path / "d")
    shutil.copytree(root / "experts" / "a", tmp_path / "a")
    with pytest.raises(
        UnsupportedError, match="d: CohereForCausalLM changes its embeddings or logits outside of its lay"
    ):
        UnequalModel(tmp_path, MixtureSettings("perplexity", "shared"))
    own = UnequalModel(tmp_path, MixtureSettings("perplexity"))
    own.task = "d"
    with torch.no_grad():
        assert torch.equal(own.logits(IDS), loaded(tmp_path / "d")(IDS).logits)


def change_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġcat"] = vocabulary["Ġcat"], vocabulary["Ġthe"]
    path.write_text(json.dumps(found))


def change_splitting(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(found))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_vocabulary, r"b has another tokenizer than a: token 'Ġcat' is \d+ and \d+; experts of a mixture must"),
        (change_splitting, r"and cut texts in other ways \(pre_tokenizer of tokenizer.json\)"),
        (lambda folder: add_tokenizer(folder, bos=True), r"'a' becomes the tokens \[0, \d+\] and \[\d+\]"),
        (lambda folder: [each.unlink() for each in folder.glob("tokenizer*")], "b: has no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "b: has weights and no config.json"),
        (lambda folder: cut_short(folder / "model.safetensors"), r"b/model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "b: is an adapter, and experts"),
        (lambda folder: edit_config(folder, architectures=["BertModel"]), "b: is not a language model"),
        (lambda folder: edit_config(folder, num_hidden_layers=4), r"model.layers.3.* is missing"),
    ],
)
def test_a_bad_expert(root: Path, tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    for name in "ab":
        shutil.copytree(root / "experts" / name, tmp_path / "x" / name)
    change(tmp_path / "x" / "b")
    given = [f"{name}={root / name}.txt" for name in "ab"]
    found = run("route", tmp_path / "x", "--data", *given, "--length", 16, "--gates", "mergeme")
    assert found.code == 2, found.out
    assert re.search(message, found.err), found.err


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_without_experts(root: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        open_experts(tmp_path / "none")
    with pytest.raises(NotFoundError, match="has no folders of models"):
        open_experts(tmp_path)
    with pytest.raises(ParameterError, match=f"have no base; give their folder alone: {root / 'experts'}"):
        open_experts(f"{root / 'experts' / 'a'}+{root / 'experts'}")
    with pytest.raises(NotFoundError, match="models of unequal sizes need none"):
        open_tasks(root / "experts")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFoundError, match="is not a folder"):
        open_experts(tmp_path / "file")


def damaged(path: Path, change: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    if change in ("format", "kind", "tasks", "settings"):
        values = {"format": "9", "kind": "x", "tasks": '["a", "b"]', "settings": '{"top": 0}'}
        metadata[change] = values[change]
    elif change == "hash":
        metadata["shared"] = json.dumps([*json.loads(metadata["shared"])[:2], "x"])
    elif change == "nan":
        tensors["router/weight"][0] = float("nan")
    elif change == "dtype":
        tensors["router/bias"] = tensors["router/bias"].half()
    elif change == "width":
        tensors["into/b"] = tensors["into/b"][:, :4].contiguous()
    elif change == "more":
        tensors["out/d"] = torch.zeros(1)
    else:
        del tensors[change]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("format", "format 9 is of a later version; this one reads 1"),
        ("kind", "holds no mixture of unequal experts; make it again: merganser route FOLDER --gates mergeme"),
        ("tasks", "is for the experts a, b, there are a, b, c"),
        ("settings", "top: must be a whole number"),
        ("hash", "was made for another model 'c'"),
        ("nan", "router/weight contains NaN or infinity"),
        ("dtype", "router/bias is torch.float16, must be float32"),
        ("width", r"into/b is \[32, 4\], must be \[32, 24\]"),
        ("more", r"out/d is \[1\], must be missing"),
        ("router/bias", r"router/bias is missing, must be \[3\]"),
    ],
)
def test_damaged_mixtures(root: Path, change: str, message: str) -> None:
    model = opened(root / "experts", "router", "shared")
    path = model.save()
    damaged(path, change)
    with pytest.raises(MergeError, match=message):
        UnequalModel(root / "experts")
    path.unlink()


def test_files_that_are_no_gates(root: Path) -> None:
    path = root / "experts" / GATES_FILE
    path.write_bytes(b"xxxxxxxxxxxx")
    with pytest.raises(CheckpointError, match="is damaged, or holds no"):
        UnequalModel(root / "experts")
    with pytest.raises(CheckpointError, match="is damaged, or holds no gates"):
        evaluate([f"{root / 'experts'}#gates"], [root / "a.txt"])
    with pytest.raises(MergeError, match="exists, and merganser did not write it"):
        opened(root / "experts").save()
    path.unlink()
    with pytest.raises(NotFoundError, match="models of unequal sizes need none"):
        evaluate([f"{root / 'experts'}#gates"], [root / "a.txt"])
    # a mixture by perplexity over own embeddings is its settings alone
    opened(root / "experts", "perplexity").save()
    assert load_file(path) == {}
    assert UnequalModel(root / "experts").settings.by == "perplexity"
    path.unlink()


def test_snippet_of_the_page(root: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/gates.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"^```python of-unequal-experts\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, expert in (("math", "a"), ("python", "b")):
        shutil.copytree(root / "experts" / expert, tmp_path / name)
    names = {"math_texts": [TEXTS["a"]], "python_texts": [TEXTS["b"]]}
    exec(snippet.replace('"models"', repr(str(tmp_path))).replace("max_new_tokens=50", "max_new_tokens=5"), names)
    assert len(names["tokens"]) == 2
