"""Which token has which id, read from the files of tokenizers."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordPiece

from merganser.errors import CheckpointError
from merganser.tokenizer.vocabulary import Vocabulary, read_vocabulary, same_vocabulary

WORDS = ["<unk>", "a", "b", "ab", "Ġtoo", 'quote"s', '"merges": ["a"]', "\u2581über"]


def read(folder: Path) -> Vocabulary | None:
    return read_vocabulary({path.name: path for path in folder.iterdir()})


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def piece(text: str, number: int) -> bytes:
    """A piece of a sentencepiece model: text, score, type."""
    data = text.encode()
    body = b"\x0a" + bytes([len(data)]) + data + b"\x15\x00\x00\x80\x3f" + b"\x18" + bytes([number % 6 + 1])
    return b"\x0a" + bytes([len(body)]) + body


@pytest.mark.parametrize(
    "model",
    [
        BPE({word: i for i, word in enumerate(WORDS)}, [("a", "b")]),
        WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"),
        Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=0),
    ],
    ids=["bpe", "wordpiece", "unigram"],
)
@pytest.mark.parametrize("pretty", [False, True])
def test_a_tokenizer_json(tmp_path: Path, model: Any, pretty: bool) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("a")])
    tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=pretty)
    found = read(tmp_path)
    assert found is not None
    assert found.tokens == {number: token for token, number in tokenizer.get_vocab().items()}
    assert found.added == {1, len(WORDS)}
    assert (found.file, found.numbered) == ("tokenizer.json", True)


def test_a_tokenizer_json_in_another_order(tmp_path: Path) -> None:
    model = {"merges": [["a", "b"]], "vocab": {"a": 0, "b": 1}, "unk_token": None}
    write(tmp_path, "tokenizer.json", {"model": model, "added_tokens": [{"id": 2, "content": "<s>"}], "version": "1"})
    found = read(tmp_path)
    assert found is not None
    assert (found.tokens, found.added) == ({0: "a", 1: "b", 2: "<s>"}, {2})


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer.json", b"\xef\xbb\xbf" + json.dumps({"model": {"vocab": {"a": 0}}}).encode())
    write(tmp_path, "tokenizer_config.json", b"\xef\xbb\xbf{}")
    found = read(tmp_path)
    assert found is not None
    assert found.tokens == {0: "a"}


def test_added_tokens_stand_beside(tmp_path: Path) -> None:
    write(tmp_path, "vocab.json", {"a": 0, "b": 1})
    write(tmp_path, "added_tokens.json", {"<s>": 2})
    entries = {"3": {"content": "</s>", "special": True}, "1": {"content": "b"}}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": entries})
    found = read(tmp_path)
    assert found is not None
    assert found.tokens == {0: "a", 1: "b", 2: "<s>", 3: "</s>"}
    assert found.added == {2, 3}


def test_a_vocab_txt(tmp_path: Path) -> None:
    write(tmp_path, "vocab.txt", b"[PAD]\n[UNK]\r\nthe\n")
    found = read(tmp_path)
    assert found is not None
    assert found.tokens == {0: "[PAD]", 1: "[UNK]", 2: "the"}


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    # a setting of the trainer stands behind the pieces
    write(tmp_path, "tokenizer.model", b"".join(map(piece, WORDS, range(9))) + b"\x12\x02\x18\x01")
    found = read(tmp_path)
    assert found is not None
    assert list(found.tokens.values()) == WORDS
    assert not found.numbered


def test_a_tiktoken_file(tmp_path: Path) -> None:
    lines = [base64.b64encode(word.encode()) + b" %d\n" % i for i, word in enumerate(WORDS)]
    for name in ("tokenizer.model", "qwen.tiktoken"):
        folder = tmp_path / name
        write(folder, name, b"".join(lines))
        found = read(folder)
        assert found is not None
        assert [base64.b64decode(found.tokens[i]).decode() for i in range(len(WORDS))] == WORDS
        assert found.spelling == "base64"


def test_no_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, "chat_template.jinja", b"{{ messages }}")
    write(tmp_path, "tokenizer_config.json", {})
    assert read(tmp_path) is None
    write(tmp_path, "tokenizer.json", {"version": "1.0"})
    assert read(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", {"version": "1.0", "model": {"type": "BPE"}}, "has no model.vocab"),
        ("tokenizer.json", {"model": 3}, "is not valid JSON"),
        ("tokenizer.json", b"", "is not valid JSON"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}', "is not valid JSON"),
        ("tokenizer.json", b"\xff\xfe{}", "is not UTF-8 text"),
        ("tokenizer.json", b"[" * 500_000, "is not valid JSON"),
        ("tokenizer.json", b'{"model": ' + b"[" * 500_000, "is not valid JSON"),
        ("tokenizer.json", b'{"x": ' + b"[" * 500_000, "is nested too deeply"),
        ("tokenizer.json", {"model": {"vocab": {"a": "0"}}}, "model.vocab: must map tokens to ids"),
        ("tokenizer.json", {"model": {"vocab": {"a": True}}}, "model.vocab: must map tokens to ids"),
        ("tokenizer.json", {"model": {"vocab": {"a": -1}}}, "model.vocab: must map tokens to ids"),
        ("tokenizer.json", {"model": {"vocab": "a"}}, "model.vocab: must map tokens to ids"),
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0], "b"]}}, "pairs of a token and its score"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": ' + b"9" * 100_000 + b"}}}", "a number of 100000 digits"),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": "1", "content": "x"}], "model": {"vocab": {}}},
            "added_tokens must",
        ),
        ("tokenizer.json", {"added_tokens": [3], "model": {"vocab": {}}}, "added_tokens must"),
        ("vocab.json", {"de": {"a": 0}}, "must map tokens to ids"),
        ("vocab.json", b"[1]", "must be a JSON object"),
        ("vocab.txt", b"\xff", "is not UTF-8 text"),
        ("tokenizer.model", b"", "is not a sentencepiece model"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f", "is not a sentencepiece model"),
        ("tokenizer.model", b"\xff" * 100, "is not a sentencepiece model"),
        ("tokenizer.model", piece("word", 1)[:-4], "is not a sentencepiece model"),
        ("x.tiktoken", b"YQ== 0\nhello\n", "every line must be a token in base64 and its id"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    file = write(tmp_path, name, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    "content",
    [
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
        {"added_tokens_decoder": {"3": {"content": 3}}},
        {"added_tokens_decoder": {"3": None}},
    ],
)
def test_added_tokens_of_the_wrong_kind_are_refused(tmp_path: Path, content: Any) -> None:
    write(tmp_path, "vocab.json", {"a": 0})
    write(tmp_path, "tokenizer_config.json", content)
    with pytest.raises(CheckpointError, match="must map ids to tokens"):
        read(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="is a named pipe, where a regular file is needed"):
        read(tmp_path)


def test_a_file_of_a_size_that_no_tokenizer_has(tmp_path: Path) -> None:
    with write(tmp_path, "tokenizer.json", {}).open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(CheckpointError, match="is larger than"):
        read(tmp_path)


def test_the_same_vocabulary_beside_other_files(tmp_path: Path) -> None:
    for folder, template in (("a", "x"), ("b", "y"), ("c", "z")):
        write(tmp_path / folder, "tokenizer.json", {"model": {"vocab": {"a": 0}}})
        write(tmp_path / folder, "tokenizer_config.json", {"chat_template": template})
    write(tmp_path / "c", "added_tokens.json", {"<s>": 1})
    a, b, c = ({path.name: path for path in (tmp_path / folder).iterdir()} for folder in "abc")
    assert same_vocabulary(a, b)
    assert not same_vocabulary(a, c)
    write(tmp_path / "b", "tokenizer.json", {"model": {"vocab": {"b": 0}}})
    assert not same_vocabulary(a, b)
    assert not same_vocabulary(a, {})
