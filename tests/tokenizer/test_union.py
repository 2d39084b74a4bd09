"""Unions of tokenizers, loaded by the libraries that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from merganser.errors import CheckpointError, UnsupportedError
from merganser.tokenizer.spelling import spelling_of
from merganser.tokenizer.tokenizer_json import TokenizerJson, read_tokenizer_json
from merganser.tokenizer.union import plan_union, token_entry

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def document(model: dict[str, Any], added: dict[str, int], **more: Any) -> dict[str, Any]:
    entries = [{"id": number, "content": token, "special": True, **FLAGS} for token, number in added.items()]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": entries, "model": model, **more}


def bpe(pieces: str, merges: list[str], added: list[str]) -> dict[str, Any]:
    vocabulary = {piece: i for i, piece in enumerate(pieces.split())}
    numbered = {token: len(vocabulary) + i for i, token in enumerate(added)}
    return document(
        {"type": "BPE", "vocab": vocabulary, "merges": merges}, numbered, pre_tokenizer=LEVEL, decoder=LEVEL
    )


def word_pieces(pieces: str, added: list[str]) -> dict[str, Any]:
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", *pieces.split()])}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocabulary}
    numbered = {token: len(vocabulary) + i for i, token in enumerate(added)}
    return document(model | {"max_input_chars_per_word": 100}, numbered, pre_tokenizer={"type": "Whitespace"})


def unigram(pieces: dict[str, float], added: list[str]) -> dict[str, Any]:
    vocabulary = [["<unk>", 0.0], *([piece, score] for piece, score in pieces.items())]
    numbered = {token: len(vocabulary) + i for i, token in enumerate(added)}
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return document(
        {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False}, numbered, pre_tokenizer=meta
    )


CASES = {
    "BPE": (
        bpe("a b c d Ġ ab", ["a b"], ["<s>", "</s>"]),
        bpe("a b c d Ġ ab abc Ġd", ["a b", "ab c", "Ġ d"], ["<s>", "<tool>"]),
        "abc d<tool>ab",
        ["abc", "Ġd", "<tool>", "ab"],
    ),
    "WordPiece": (
        word_pieces("mer ##gan", ["[CLS]"]),
        word_pieces("mer ##gan ##ser", ["[CLS]", "[TOOL]"]),
        "merganser [TOOL]",
        ["mer", "##gan", "##ser", "[TOOL]"],
    ),
    "Unigram": (
        unigram({"▁a": -1.0, "▁": -2.0, "b": -3.0}, ["<s>"]),
        unigram({"▁a": -1.0, "b": -3.0, "▁ab": -1.5, "▁": -2.0}, ["<s>", "<tool>"]),
        "ab<tool>b",
        ["▁ab", "<tool>", "▁", "b"],
    ),
}


def read(folder: Path, name: str, content: dict[str, Any]) -> TokenizerJson:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content))
    return read_tokenizer_json(file)


@pytest.mark.parametrize("kind", CASES)
def test_libraries_read_the_union(tmp_path: Path, kind: str) -> None:
    first, second, text, tokens = CASES[kind]
    own, other = read(tmp_path, "a", first), read(tmp_path, "b", second)
    extension = plan_union(("a", own), [("b", other)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(extension.document(own)))
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    wanted = {**own.ids, **{token: new.id for token, new in extension.tokens.items()}}
    assert set(wanted) == set(own.ids) | set(other.ids)
    assert sorted(wanted.values()) == list(range(len(wanted)))
    plain, loaded = Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(out)
    for token, number in wanted.items():
        assert plain.token_to_id(token) == number
        assert loaded.convert_tokens_to_ids(token) == number
    assert plain.encode(text, add_special_tokens=False).tokens == tokens
    assert loaded(text, add_special_tokens=False).input_ids == [wanted[token] for token in tokens]
    # what the first tokenizer can spell by itself stays as it was
    assert plain.encode("a").ids == Tokenizer.from_str(json.dumps(first)).encode("a").ids


def test_the_merges_of_the_first_come_first(tmp_path: Path) -> None:
    own = read(tmp_path, "a", bpe("a b c ab", ["a b"], []))
    other = read(tmp_path, "b", bpe("a b c bc abc", ["b c", "a bc"], []))
    found = plan_union(("a", own), [("b", other)]).document(own)
    assert found["model"]["merges"] == ["a b", "b c", "a bc"]
    assert Tokenizer.from_str(json.dumps(found)).encode("abc").tokens == ["ab", "c"]


def test_merges_as_pairs(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    own = read(tmp_path, "a", document(model, {}))
    other = read(tmp_path, "b", document({"type": "BPE", "vocab": {"a": 0, "b": 1, "ba": 2}, "merges": ["b a"]}, {}))
    found = plan_union(("a", own), [("b", other)]).document(own)
    assert found["model"]["merges"] == [["a", "b"], ["b", "a"]]


def test_tokens_of_several_models_are_listed_once(tmp_path: Path) -> None:
    own = read(tmp_path, "a", bpe("a", [], []))
    others = [
        ("b", read(tmp_path, "b", bpe("a x", [], ["<t>"]))),
        ("c", read(tmp_path, "c", bpe("a y x", [], ["<t>"]))),
    ]
    found = plan_union(("a", own), others)
    assert {token: (new.id, new.owner) for token, new in found.tokens.items()} == {
        "x": (1, "b"),
        "<t>": (2, "b"),
        "y": (3, "c"),
    }


def test_only_added_tokens_need_no_common_spelling(tmp_path: Path) -> None:
    own = read(tmp_path, "a", bpe("a b", [], []))
    other = read(
        tmp_path,
        "b",
        unigram({}, []) | {"added_tokens": [{**token_entry("<t>"), "id": 1}, {**token_entry("<unk>"), "id": 0}]},
    )
    assert set(plan_union(("a", own), [("b", other)]).tokens) == {"<t>", "<unk>"}
    with pytest.raises(UnsupportedError, match="spell their tokens in different ways"):
        plan_union(("a", own), [("b", read(tmp_path, "c", unigram({"▁x": -1.0}, [])))])


def test_a_gap_in_a_unigram_vocabulary(tmp_path: Path) -> None:
    own = read(tmp_path, "a", unigram({"▁a": -1.0}, []) | {"added_tokens": [{**token_entry("<t>"), "id": 7}]})
    extension = plan_union(("a", own), [("b", read(tmp_path, "b", unigram({"▁b": -1.0}, [])))])
    with pytest.raises(CheckpointError, match="id 2 has no token, and a Unigram vocabulary has no place"):
        extension.document(own)


@pytest.mark.parametrize(
    ("content", "token", "data"),
    [
        (bpe("a", [], []), "Ġhé", b" h\xe9"),
        (bpe("a", [], []), "▁", None),
        (unigram({}, []), "▁hé", " hé".encode()),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "<0xE9>", b"\xe9"),
        (word_pieces("a", []), "##ser", b"ser"),
        (word_pieces("a", []), "mer", b" mer"),
        ({"model": {"type": "WordLevel"}}, "mer", b"mer"),
    ],
)
def test_what_a_token_stands_for(content: dict[str, Any], token: str, data: bytes | None) -> None:
    how = spelling_of(content)
    assert how.read(token) == data
    if data is not None and how.kind in ("bytes", "text"):
        assert how.write(data) == token


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object"),
        ({}, "has no model.vocab"),
        ({"model": {"type": "BPE", "vocab": ["a"]}}, "model.type 'BPE' is not known"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}}}, "model.vocab: must map tokens to ids"),
        ({"model": {"type": "BPE", "vocab": {"a": True}}}, "model.vocab: must map tokens to ids"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}}}, "id 0 has two tokens, 'a' and 'b'"),
        ({"model": {"vocab": [["a", "b"]]}}, "pairs of a token and its score"),
        ({"model": {"vocab": [["a", 0], ["a", 1]]}}, "token 'a' has two ids, 0 and 1"),
        ({"model": {"vocab": {}}, "added_tokens": {}}, "added_tokens must be a list"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": "1"}]}, "an id and a content"),
        (
            {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": "b"}]},
            "id 0 has two tokens, 'a' and 'b'",
        ),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "a"}]}, "'a' has two ids, 0 and 1"),
    ],
)
def test_damaged_files(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer_json(file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(file))
