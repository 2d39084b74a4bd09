"""`merganser transplant --romanise` on small Unigram models, with a romaniser of a few letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merganser.transplant import romanised
from tests.cli.tiny import names, run
from tests.engine.vocabulary.by_hand import EMBEDDING, FLAGS, HEAD, bpe, model
from tests.making import read_json, read_model

LETTERS = {"п": "p", "р": "r", "и": "i", "в": "v", "е": "e", "т": "t", "ї": "i", "½": "1 2", "ь": ""}
PIECES: list[tuple[str, float]] = [
    ("<unk>", 0.0),
    ("▁", -1.0),
    ("▁привет", -5.0),
    ("▁при", -4.0),
    ("▁прї", -3.0),
    ("и", -6.5),
    ("ї", -7.0),
    ("вет", -6.0),
    ("i", -2.0),
    ("½", -8.0),
    ("ь", -8.0),
    ("<0xD0>", -9.0),
    ("пр", -4.0),
    ("прь", -4.0),
]
ORIGINS = {"▁pri": [3, 4], "pr": [12, 13], "▁privet": [2], "vet": [7]}
"""The new spellings: i is a token already, ½ has a blank in Latin letters, and ь is nothing."""


def document(**more: Any) -> dict[str, Any]:
    added = [{"id": len(PIECES), "content": "<mask>", "special": True, **FLAGS}]
    own = {"type": "Unigram", "unk_id": 0, "vocab": [list(pair) for pair in [*PIECES, ("<mask>", 0.0)]]}
    return {"version": "1.0", "added_tokens": added, "model": own, **more}


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    def romanise(text: str) -> str:
        return "".join(LETTERS.get(letter, letter) for letter in text)

    monkeypatch.setattr(romanised, "romaniser", lambda: romanise)


def expected(mode: str) -> list[tuple[str, float, list[int]]]:
    """Text, score and rows of every new piece, in order; written out from the definition."""
    found = []
    for text, numbers in ORIGINS.items():
        scores = {number: PIECES[number][1] for number in numbers}
        if mode == "average":
            found.append((text, sum(scores.values()) / len(scores), numbers))
        else:
            wanted = max(scores.values()) if mode == "max" else min(scores.values())
            found.append((text, wanted, [next(number for number in numbers if scores[number] == wanted)]))
    return sorted(found, key=lambda each: (-each[1], each[2]))


@pytest.mark.parametrize(
    ("mode", "head", "rows"), [("max", True, 15), ("min", False, 17), ("average", True, 17), ("average", False, 15)]
)
def test_pieces_and_rows(tmp_path: Path, mode: str, head: bool, rows: int) -> None:
    own = model(tmp_path / "own", 0, document(), rows=rows, head=head, dtype=torch.bfloat16)
    (own / "spiece.model").write_bytes(b"stale")
    out = tmp_path / "out"
    found = run("transplant", own, "--romanise", mode, "--out", out)
    assert found.code == 0, found.err
    assert f"romanised ({mode})" in found.out
    assert "4 of tokens in Latin letters" in found.out
    new = expected(mode)
    vocabulary = read_json(out, "tokenizer.json")["model"]["vocab"]
    assert vocabulary[: len(PIECES)] == [list(pair) for pair in PIECES]
    assert vocabulary[len(PIECES) + 1 :] == [[text, score] for text, score, _ in new]
    before, after = load_file(own / "model.safetensors"), read_model(out)
    for key in (EMBEDDING, HEAD) if head else (EMBEDDING,):
        assert after[key].shape[0] == len(PIECES) + 1 + len(new)
        assert torch.equal(after[key][: len(PIECES) + 1], before[key][: len(PIECES) + 1])
        for place, (_, _, numbers) in enumerate(new, start=len(PIECES) + 1):
            assert torch.equal(after[key][place], before[key][numbers].double().mean(0).float().bfloat16())
    assert read_json(out, "config.json")["vocab_size"] == len(PIECES) + 1 + len(new)
    assert "spiece.model" not in names(out)
    assert all(torch.equal(after[key], before[key]) for key in before if key not in (EMBEDDING, HEAD))


def test_the_tokenizer_reads_romanised_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    own = model(tmp_path / "own", 0, document(pre_tokenizer=space), rows=15)
    assert run("transplant", own, "--romanise", "max", "--out", tmp_path / "out").code == 0
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("привет privet").tokens == ["▁привет", "▁privet"]
    assert tokenizer.encode("<mask>").ids == [len(PIECES)]


REFUSED: list[tuple[list[str], str]] = [
    (["--romanise", "most"], "--romanise most: is not known"),
    (["--romanise", "max", "--tokenizer", "own"], "give --tokenizer, --romanise or --text, one of them"),
    ([], "give --tokenizer, --romanise or --text, one of them"),
    (["--romanise", "max", "--k", "3"], "--method and --k are for --tokenizer"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_wrong_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    own = model(tmp_path / "own", 0, document(), rows=15)
    found = run("transplant", own, *arguments, "--out", tmp_path / "out")
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert names(tmp_path) == ["own"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (bpe(["a", "b"]), "its vocabulary is BPE; only those of SentencePiece Unigram models"),
        (None, "has no tokenizer whose tokens can be read"),
        (
            {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", -1.0]]}},
            "all pieces of its vocabulary are in Latin letters",
        ),
        (
            {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "vocab": [["ї", "x"]]}},
            "tokenizer.json",
        ),
    ],
)
def test_models_that_cannot_be_romanised(tmp_path: Path, tokenizer: Any, message: str) -> None:
    own = model(tmp_path / "own", 0, tokenizer, rows=15)
    found = run("transplant", own, "--romanise", "max", "--out", tmp_path / "out")
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert found.err.count("\n") == 1
    assert names(tmp_path) == ["own"]


def test_uroman_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "uroman", None)
    own = model(tmp_path / "own", 0, document(), rows=15)
    found = run("transplant", own, "--romanise", "max", "--out", tmp_path / "out")
    assert (found.code, found.err) == (2, "error: --romanise needs uroman: pip install 'merganser[romanise]'\n")
