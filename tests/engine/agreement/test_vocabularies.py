"""Models whose embeddings have equal numbers of rows, for other tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError
from tests.making import VOCAB, llama, llama_config, make_recipe, write_model

TOKENS = [f"w{i}" for i in range(VOCAB - 4)]
SPECIAL = ["<s>", "</s>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]


def tokenizer(tokens: list[str], special: list[str] = SPECIAL) -> str:
    """A tokenizer.json."""
    added = [{"id": len(tokens) + i, "content": token, "special": True} for i, token in enumerate(special)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": added, "model": model})


def models(root: Path, *tokenizers: str | None) -> list[Path]:
    """Llamas that differ in their weights, each with a tokenizer."""
    return [
        write_model(root / f"m{i}", llama(i), llama_config(), side_files={"tokenizer.json": text} if text else None)
        for i, text in enumerate(tokenizers)
    ]


def linear(paths: list[Path], **keys: Any) -> dict[str, Any]:
    return make_recipe("linear", paths, parameters={"weight": 0.5}, **keys)


def test_a_permuted_vocabulary_is_refused(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS[::-1]))
    with pytest.raises(CheckpointError) as caught:
        merge(linear(paths), tmp_path / "out")
    message = str(caught.value)
    assert "28 rows of the embedding belong to other tokens than in" in message
    assert all(str(path) in message for path in paths)
    assert "'tokenizer_source: base' or 'tokenizer_source: union' in the recipe matches rows by token" in message
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer([f"x{i}" for i in range(len(TOKENS))]))
    with pytest.raises(CheckpointError, match="0 is 'x0', not 'w0'"):
        plan(linear(paths))


def test_a_third_model_is_compared_too(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS), tokenizer(TOKENS[::-1]))
    with pytest.raises(CheckpointError, match=f"^{paths[2]}: "):
        plan(linear(paths[1:], base_model=None) | {"base_model": str(paths[0])})


def test_renamed_and_added_tokens_are_named(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS, [*SPECIAL[:2], "<tool>", SPECIAL[3]]))
    [warning] = merge(linear(paths), tmp_path / "out").record["warnings"]
    assert warning.startswith(f"{paths[1]}: 1 row of the embedding belongs to another token than in {paths[0]}")
    assert "30 is '<tool>', not '<|reserved_special_token_0|>'" in warning


def test_tokens_in_rows_that_the_other_keeps_free_are_named(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS, SPECIAL[:2]), tokenizer(TOKENS, [*SPECIAL[:2], "<think>"]))
    [warning] = plan(linear(paths)).warnings
    assert warning.startswith(f"{paths[1]}: 1 token that the tokenizer of {paths[0]} does not have")
    assert "'<think>' (30)" in warning


def test_control_characters_of_tokens_are_not_shown_raw(tmp_path: Path) -> None:
    evil = "\x1b[31m\ud800" + "x" * 1000
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS, [*SPECIAL[:2], evil, SPECIAL[3]]))
    [warning] = plan(linear(paths)).warnings
    assert "\x1b" not in warning
    assert len(warning.encode()) < 500


def test_models_with_the_same_tokenizer_and_models_without_any_go_on(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS), None)
    assert plan(linear(paths)).warnings == []
    assert plan(linear(paths[::-1])).warnings == []
    assert plan(linear(paths[2:])).warnings == []


def test_layers_between_the_ends_need_no_tokenizer(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS[::-1]))
    ranges = [(paths[0], [0, 1]), (paths[1], [0, 2]), (paths[0], [1, 2])]
    slices = [{"sources": [{"model": str(path), "layer_range": layers}]} for path, layers in ranges]
    assert plan({"merge_method": "passthrough", "slices": slices}).warnings == []
    # the head is that of the last slice
    with pytest.raises(CheckpointError, match="28 rows of the embedding"):
        plan({"merge_method": "passthrough", "slices": slices[:2]})


def test_a_tokenizer_source_without_a_tokenizer(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), None, None)
    with pytest.raises(CheckpointError, match=f"^{paths[1]}: has no files of a tokenizer"):
        plan(linear(paths, tokenizer_source=str(paths[1])))
    # there is none to lose
    assert plan(linear(paths[1:], tokenizer_source=str(paths[2]))).warnings == []


def test_a_tokenizer_source_with_more_tokens_than_rows(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS, [*SPECIAL, "<tool>"]))
    with pytest.raises(CheckpointError, match=r"1 token after the last of the 32 rows .*'<tool>' \(32\)"):
        plan(linear(paths, tokenizer_source=str(paths[1])))
    # of models that have the same one, too
    (paths[0] / "tokenizer.json").write_text((paths[1] / "tokenizer.json").read_text())
    with pytest.raises(CheckpointError, match="1 token after the last of the 32 rows"):
        plan(linear(paths, tokenizer_source=str(paths[1])))
    (paths[0] / "tokenizer.json").write_text(tokenizer(TOKENS))
    # padding behind the rows is what many fine-tunes have
    (paths[1] / "tokenizer.json").write_text(tokenizer(TOKENS, [*SPECIAL, "[PAD]"]))
    assert plan(linear(paths, tokenizer_source=str(paths[1]))).warnings == []
    # the donor's own
    (paths[0] / "tokenizer.json").write_text(tokenizer(TOKENS, [*SPECIAL, "<tool>"]))
    [warning] = plan(linear(paths)).warnings
    assert "after the last of the 32 rows" in warning


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"model": {}}',
        b"[]",
        b'{"model": {"vocab": 3}}',
        b'{"a": ' + b"[" * 200_000,
        b"\xff\xfe",
        b'{"model": {"vocab": {"a": 1e3}}}',
    ],
)
def test_a_damaged_tokenizer_is_said(tmp_path: Path, content: bytes) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS))
    (paths[1] / "tokenizer.json").write_bytes(content)
    [warning] = plan(linear(paths)).warnings
    assert warning.startswith(f"{paths[1]}/tokenizer.json: ")
    assert f"so the tokens of {paths[1]} were not compared" in warning


def test_a_pipe_in_the_place_of_a_tokenizer_is_not_waited_for(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), None)
    os.mkfifo(paths[1] / "tokenizer.json")
    assert all("is a named pipe" in warning for warning in plan(linear(paths)).warnings)


def test_the_result_of_a_stage_has_the_tokens_of_its_donor(tmp_path: Path) -> None:
    paths = models(tmp_path, tokenizer(TOKENS), tokenizer(TOKENS), tokenizer(TOKENS[::-1]))

    def recipe(other: Path) -> str:
        first = make_recipe("linear", paths[:2], parameters={"weight": 1.0}, name="first")
        last = make_recipe("linear", [Path("first"), other], parameters={"weight": 1.0})
        return f"{json.dumps(first)}\n---\n{json.dumps(last)}\n"

    assert plan(recipe(paths[1])).warnings == []
    with pytest.raises(CheckpointError, match="28 rows of the embedding"):
        merge(recipe(paths[2]), tmp_path / "out")
    assert merge(recipe(paths[1]), tmp_path / "out").record["warnings"] == []
