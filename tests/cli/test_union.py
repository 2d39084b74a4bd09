"""The union of tokenizers on the command line: what is written, and which tokenizers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny import linear, recipe, run

WORDS = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<s>"}]}
PIECES = {
    "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]},
    "added_tokens": [{"id": 2, "content": "<s>"}],
}


def tokenizers(models: Path, **files: Any) -> None:
    """Give each model a tokenizer.json, or with None no tokenizer."""
    for name, content in files.items():
        file = models / name / "tokenizer.json"
        file.unlink()
        if content is not None:
            file.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    "asked", [{"tokenizer_source": "union"}, {"tokenizer": {"source": "union"}}, {"tokenizer": {}}]
)
def test_equal_vocabularies_are_their_own_union(models: Path, asked: dict[str, Any]) -> None:
    tokenizers(models, a=WORDS, b=json.dumps(WORDS | {"truncation": None}, indent=2))
    assert run("merge", recipe(models / "r.yaml", linear("a", "b", **asked)), "out").code == 0
    assert json.loads((models / "out" / "tokenizer.json").read_text()) == WORDS


def test_the_kind_of_model_does_not_matter_where_ids_are_equal(models: Path) -> None:
    tokenizers(models, a=WORDS, b=PIECES)
    assert run("plan", recipe(models / "r.yaml", linear("a", "b", tokenizer_source="union"))).code == 0


@pytest.mark.parametrize(("first", "second"), [(None, WORDS), (WORDS, None), (None, None)])
def test_unknown_vocabularies_are_refused(models: Path, first: Any, second: Any) -> None:
    tokenizers(models, a=first, b=second)
    found = run("plan", recipe(models / "r.yaml", linear("a", "b", tokenizer_source="union")))
    assert found.code == 2
    assert " is not known (no file of its tokenizer holds one)" in found.err


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"model": []}', '{"model": {"vocab": [1]}}', '{"model": {"vocab": {}}, "added_tokens": [{}]}',
     '{"model": {"vocab": "ab"}}', '{"added_tokens": {"a": 1}}', "[" * 5000,
     '{"model": {"vocab": [[[], 1]]}}'],
)  # fmt: skip
def test_damaged_tokenizers(models: Path, content: str) -> None:
    tokenizers(models, a=content, b=content)
    found = run("plan", recipe(models / "r.yaml", linear("a", "b", tokenizer_source="union")))
    assert found.code == 2
    assert "error: a/tokenizer.json: " in found.err or "the vocabulary of a is not known" in found.err


@pytest.mark.parametrize("equal", [True, False])
def test_older_tokenizers_are_compared_by_their_files(models: Path, equal: bool) -> None:
    tokenizers(models, a=None, b=None)
    for name, text in (("a", b"x\n"), ("b", b"x\n" if equal else b"y\n")):
        (models / name / "vocab.txt").write_bytes(text)
    assert run("plan", recipe(models / "r.yaml", linear("a", "b", tokenizer={}))).code == (0 if equal else 2)


def test_stages_have_tokenizers_when_they_are_planned(models: Path) -> None:
    tokenizers(models, a=WORDS, b=WORDS)
    first = linear("a", "b", name="both", tokenizer_source="union")
    recipe(models / "r.yaml", first, linear("both", "a", tokenizer_source="union"))
    for command in (["plan", "r.yaml"], ["merge", "r.yaml", "out"]):
        found = run(*command)
        assert found.code == 0, found.err
