"""`merganser transplant --text`: tokens for frequent pairs, on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.cli.tiny import names, run
from tests.engine.vocabulary.by_hand import EMBEDDING, HEAD, bpe, model
from tests.making import read_json, read_model

LETTERS = ["a", "b", "c", "d", "Ġ", "ab"]
LEVEL = {
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}
DOCUMENT = bpe(LETTERS, ["<s>"], ["a b"], **LEVEL)
FIRST = len(LETTERS) + 1
"""The id of the first new token."""
TEXT = "abcd abcd abcd dd abcd dd\n" * 20
# abcd is ab c d at first, after a word's blank; pairs in the order of their counts, of equal ones the lower ids first
PARTS = {
    "cd": ["c", "d"],
    "abcd": ["ab", "c", "d"],
    "Ġabcd": ["Ġ", "ab", "c", "d"],
    "dd": ["d", "d"],
    "Ġdd": ["Ġ", "d", "d"],
}


def make(folder: Path, document: Any = DOCUMENT, *, text: str | bytes = TEXT, **options: Any) -> Path:
    (folder / "t.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return model(folder / "own", 0, document, rows=options.pop("rows", FIRST), **options)


def encoded(folder: Path, text: str) -> list[str]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens


@pytest.mark.parametrize("parts", ["mean", "last", "first"])
@pytest.mark.parametrize(("rows", "head"), [(FIRST, True), (FIRST + 3, False)])
def test_rows_and_tokens(tmp_path: Path, parts: str, rows: int, head: bool) -> None:
    own = make(tmp_path, rows=rows, head=head, dtype=torch.bfloat16)
    (own / "merges.txt").write_text("stale")
    out = tmp_path / "out"
    found = run("transplant", own, "--text", tmp_path / "t.txt", "--new-tokens", 4, "--parts", parts, "--out", out)
    assert found.code == 0, found.err
    document = read_json(out, "tokenizer.json")
    ids = document["model"]["vocab"]
    new = [token for token in ids if ids[token] >= FIRST]
    assert set(new) < set(PARTS)
    assert [ids[token] for token in new] == list(range(FIRST, FIRST + 4))
    assert document["model"]["merges"][0] == "a b"
    assert encoded(out, "abcd<s>")[-1] == "<s>"
    assert len(encoded(out, TEXT)) < len(encoded(own, TEXT))
    assert set(encoded(out, TEXT)) >= {"Ġabcd", "dd"}
    before, after = load_file(own / "model.safetensors"), read_model(out)
    size = max(rows, FIRST + 4)
    for key in (EMBEDDING, HEAD) if head else (EMBEDDING,):
        assert after[key].shape[0] == size
        assert torch.equal(after[key][:FIRST], before[key][:FIRST])
        for token in new:
            pieces = [LETTERS.index(piece) for piece in PARTS[token]]
            chosen = {"mean": pieces, "last": pieces[-1:], "first": pieces[:1]}
            expected = before[key][chosen[parts]].double().mean(0).float().bfloat16()
            assert torch.equal(after[key][ids[token]], expected)
    assert read_json(out, "config.json")["vocab_size"] == size
    assert "merges.txt" not in names(out)
    assert all(torch.equal(after[key], before[key]) for key in before if key not in (EMBEDDING, HEAD))


def test_all_pairs_and_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = run("transplant", "own", "--text", "t.txt", "--out", "out")
    assert found.code == 0, found.err
    assert encoded(tmp_path / "out", "abcd dd abcd") == ["abcd", "Ġdd", "Ġabcd"]
    made = read_json(tmp_path / "out", "merge.json")["vocabulary"]["made_by"]
    before, after, size = (made[f"held_out_{name}"] for name in ("tokens_before", "tokens_after", "bytes"))
    assert (made["parts"], made["new_tokens"]) == ("mean", len(PARTS))
    assert 0 < size < len(TEXT) / 5
    assert found.out.splitlines()[1:] == [
        "  7 tokens of own and 5 new, in 12 rows",
        "  own  7 rows  7 kept, 5 made of their parts",
        f"  {before / size:.3f} tokens per byte before, {after / size:.3f} now ({100 * after / before - 100:+.1f} %), on "
        f"{size} bytes of the text that was held out",
        "wrote out and out/merge.json; out/merge.vocabulary.json lists every token",
        "measure it: merganser eval out",
    ]
    assert after < before
    assert run("verify", "out").code == 0
    assert "merganser transplant: 1000 new tokens, parts mean" in (tmp_path / "out" / "README.md").read_text()


def test_a_token_that_two_pairs_make_is_one(tmp_path: Path) -> None:
    """`abc` is ab c, or a bc where bc is a token: both become the same new token."""
    document = bpe([*LETTERS, "bc"], ["<s>"], ["b c", "a b"], **LEVEL)
    own = make(tmp_path, document, rows=8, text="abc abc abc dab dab dab abd abd abd abd\n" * 30)
    assert run("transplant", own, "--text", tmp_path / "t.txt", "--out", tmp_path / "out").code == 0
    merges = read_json(tmp_path / "out", "tokenizer.json")["model"]["merges"]
    assert len(merges) == len(set(merges))
    assert encoded(tmp_path / "out", " abc dab") == ["Ġabc", "Ġdab"]


def test_pieces_of_sentencepiece(tmp_path: Path) -> None:
    """Bytes that stand for unknown letters, and the unknown token, are never merged; words may be."""
    pieces = ["<unk>", "<0xC3>", "<0xA9>", "▁", "a", "b"]
    document = bpe(pieces, [], [], normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    document["model"] |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    own = make(tmp_path, document, rows=6, text="é a bé a bé a bé a b xx\n" * 40)
    assert run("transplant", own, "--text", tmp_path / "t.txt", "--out", tmp_path / "out").code == 0
    new = [
        token for token, number in read_json(tmp_path / "out", "tokenizer.json")["model"]["vocab"].items() if number > 5
    ]
    assert "▁a▁b" in new
    assert not [token for token in new if "<" in token]


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = make(tmp_path)
    (own / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    out = tmp_path / "out"
    assert run("transplant", own, "--text", tmp_path / "t.txt", "--out", out).code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("abcd dd") == ["abcd", "Ġdd"]
    assert tokenizer.decode(tokenizer("abcd dd")["input_ids"]) == "abcd dd"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded(**tokenizer("abcd dd", return_tensors="pt")).logits.shape == (1, 2, 12)


UNIGRAM = {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", -1.0]]}}
BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({"text": b"\xff\xfe"}, [], "--text t.txt: is not UTF-8 text (byte 0)"),
    ({"text": " \n"}, [], "--text t.txt: is empty"),
    ({"text": "abcd"}, [], "--text: no pair of tokens occurs twice in a word of it"),
    ({}, ["--text", "t.text"], "--text t.text: there is no such file. Did you mean 't.txt'?"),
    ({}, ["--text", "own"], "--text own: cannot be read: "),
    ({}, ["--new-tokens", "0"], "--new-tokens 0: at least 1 is needed"),
    ({}, ["--parts", "maen"], "--parts maen: is not known. Did you mean 'mean'? Known: mean, last, first"),
    ({"document": UNIGRAM}, [], "own: its vocabulary is Unigram; only byte-pair encoding"),
    ({"document": None}, [], "own: has no tokenizer whose tokens can be read"),
    ({"document": {**DOCUMENT, "pre_tokenizer": {"type": "Quux"}}}, [], "own/tokenizer.json: cannot be loaded: "),
    ({}, ["--romanise", "max"], "give --tokenizer, --romanise or --text, one of them"),
    ({}, ["--k", "3"], "--method and --k are for --tokenizer; leave them out"),
]


@pytest.mark.parametrize(("made", "arguments", "message"), BAD)
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, Any], arguments: list[str], message: str
) -> None:
    make(tmp_path, **made)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    found = run(
        "transplant", "own", *([] if "--text" in arguments else ["--text", "t.txt"]), *arguments, "--out", "out"
    )
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert found.err.count("\n") == 1
    assert names(tmp_path) == ["own", "t.txt"]


def test_parts_without_text(tmp_path: Path) -> None:
    own = make(tmp_path)
    found = run("transplant", own, "--tokenizer", own, "--parts", "mean", "--out", tmp_path / "out")
    assert (found.code, found.err) == (
        2,
        "error: transplant: --new-tokens, --parts and --train-steps are for --text; leave them out\n",
    )
